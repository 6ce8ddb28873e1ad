"""The nodes of the graph, one module each, in the words of the design."""
