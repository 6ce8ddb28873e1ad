"""What assets need from outside: hardware, artefact storage, the worker's launcher, the Hub."""
