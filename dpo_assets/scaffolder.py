"""`dg scaffold defs dpo_assets.DpoPipeline my_bot ...`: a defs.yaml that loads as it is."""

from __future__ import annotations

from dagster.components import Scaffolder, ScaffoldRequest, scaffold_component
from pydantic import BaseModel, Field


class ScaffoldParams(BaseModel):
    """Flags of the scaffold command."""

    base_model: str = Field(
        default="builtin:stories260k", description="Hub id, local folder, or builtin:stories260k to try it on a CPU."
    )
    revision: str | None = Field(default=None, description="Commit sha of a Hub base model.")
    feedback: str = Field(default="builtin:oasst", description="File or glob of feedback, or builtin:oasst to try it.")
    format: str | None = Field(default=None, description="trl, oasst_tree or hh_rlhf.")
    repo_id: str | None = Field(default=None, description="Hub repository of the release.")


class DpoPipelineScaffolder(Scaffolder[ScaffoldParams]):
    """Writes defs.yaml with what is needed; everything else has a default that `dpo-assets recipe` lists."""

    @classmethod
    def get_scaffold_params(cls) -> type[ScaffoldParams]:
        return ScaffoldParams

    def scaffold(self, request: ScaffoldRequest[ScaffoldParams]) -> None:
        params = request.params or ScaffoldParams()
        base: dict[str, object] = {"source": params.base_model}
        feedback: dict[str, object] = {}
        if params.revision:
            base["revision"] = params.revision
        if params.base_model.startswith("builtin:"):
            feedback["max_length"] = 512
        default_format = "oasst_tree" if params.feedback == "builtin:oasst" else "trl"
        source = {"path": params.feedback, "format": params.format or default_format}
        attributes: dict[str, object] = {
            "name": request.target_path.name,
            "base_model": base,
            "feedback": {"sources": [source], **feedback},
        }
        if params.repo_id:
            attributes["publishing"] = {"repo_id": params.repo_id}
        scaffold_component(request, attributes)
