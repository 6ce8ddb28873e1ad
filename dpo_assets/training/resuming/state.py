"""All that the next step of a run depends on: what is trained, optimizer, schedule, generators, running sums."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_assets.errors import ConfigError
from dpo_assets.training.private.transformers import RunningLoss, running_loss, set_running_loss
from dpo_assets.training.snapshot import Resumable, Snapshot


def state_of(trainer: Any, parts: Mapping[str, Resumable]) -> Snapshot:
    """What a transformers.Trainer would need to go on with the next step, and its resumable parts with it."""
    whole = Snapshot()
    whole.add("model", Snapshot(_trained(trainer)))
    whole.add("optimizer", _of_optimizer(trainer.optimizer))
    whole.add("loss", _of_loss(running_loss(trainer)))
    whole.add("random", _of_generators())
    whole.values["schedule"] = trainer.lr_scheduler.state_dict()
    scaler = trainer.accelerator.scaler
    whole.values["scaler"] = None if scaler is None else scaler.state_dict()
    for name, part in parts.items():
        whole.add(name, part.snapshot())
    return whole


@torch.no_grad()
def restore(trainer: Any, snapshot: Snapshot, parts: Mapping[str, Resumable]) -> None:
    """Puts the state back, all but the random generators: those when the first batch is there (`restore_random`).

    Only what is trained is overwritten. What the run is measured against (a frozen adapter, a merged base, a second
    model, scores of a cache) was made from the start before, so it stays the start.

    Raises:
        ConfigError: when the model has other trained parameters than the checkpoint.
    """
    parameters, saved = _trained(trainer), snapshot.part("model").tensors
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in saved.items()}:
        raise ConfigError(
            "the checkpoint holds other parameters than this model trains; delete the stage's checkpoints"
        )
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
    trainer.optimizer.load_state_dict(_to_optimizer(snapshot.part("optimizer")))
    trainer.lr_scheduler.load_state_dict(snapshot.values["schedule"])
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(snapshot.values["scaler"])
    loss = snapshot.part("loss")
    values, tensor = loss.values, loss.tensors["since_log"].to(trainer.args.device)
    set_running_loss(trainer, RunningLoss(tensor, values["total"], values["logged_step"]))
    for name, part in parts.items():
        part.take_up(snapshot.part(name))


def restore_random(snapshot: Snapshot) -> None:
    """Puts the generators of Python, NumPy and torch back."""
    part = snapshot.part("random")
    version, internal, gauss = part.values["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = part.values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(part.tensors["cpu"])
    cuda = sorted((name for name in part.tensors if name.startswith("cuda/")), key=lambda name: int(name[5:]))
    if cuda:
        torch.cuda.set_rng_state_all([part.tensors[name] for name in cuda])


def _trained(trainer: Any) -> dict[str, Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _of_optimizer(optimizer: Any) -> Snapshot:
    state = optimizer.state_dict()
    kept = Snapshot(values={"groups": state["param_groups"], "plain": {}})
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                kept.tensors[f"{number}/{name}"] = value
            else:
                kept.values["plain"].setdefault(str(number), {})[name] = value
    return kept


def _to_optimizer(snapshot: Snapshot) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(number): dict(v) for number, v in snapshot.values["plain"].items()}
    for path, tensor in snapshot.tensors.items():
        number, _, name = path.partition("/")
        state.setdefault(int(number), {})[name] = tensor
    groups = [dict(group, betas=tuple(group["betas"])) for group in snapshot.values["groups"]]
    return {"state": state, "param_groups": groups}


def _of_loss(loss: RunningLoss) -> Snapshot:
    return Snapshot({"since_log": loss.since_log}, {"total": loss.total, "logged_step": loss.logged_step})


def _of_generators() -> Snapshot:
    numpy = np.random.get_state(legacy=True)
    assert isinstance(numpy, tuple), "asked for so"
    kind, keys, position, has_gauss, cached = numpy
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda/{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    plain = [kind, np.asarray(keys).tolist(), position, has_gauss, cached]
    return Snapshot(tensors, {"python": random.getstate(), "numpy": plain})
