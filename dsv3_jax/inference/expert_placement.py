"""Placement of redundant experts for serving: the busiest experts are duplicated to balance devices (EPLB).

A slot holds the weights of one expert on one device. In serving (report section 3.4), experts with many tokens get more
than one slot, by the observed load, and slots are assigned such that devices are about equally busy. If groups of
experts divide evenly over nodes, the slots of a group stay on one node, so that group-limited routing still reaches few
nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.linear import SCALES, TURNED
from dsv3_jax.model.moe import EXPERT_PLACEMENT
from dsv3_jax.parallel.mesh import MeshShape


def with_redundant_experts(
    variables: Mapping[str, Any], load: Mapping[str, np.ndarray], config: ModelConfig, mesh: MeshShape, redundant: int
) -> dict[str, Any]:
    """Arranges the experts' weights of a model in slots, for `Runtime(redundant_experts=redundant)`.

    Args:
      variables: as trained or loaded, without slots.
      load: from `model.transformer.expert_load`, for all sparse modules; may be summed over several calls.
      mesh: the devices of the experts, node x expert.
      redundant: slots per layer beyond one per expert.

    Raises:
      ConfigError: the total number of slots doesn't divide over the devices.
    """
    experts, devices = config.n_routed_experts, mesh.expert_parallel
    if redundant < 0 or (experts + redundant) % devices:
        raise ConfigError(
            f"{experts} experts and {redundant} redundant ones don't divide over the {devices} devices of the mesh"
        )
    slots = (experts + redundant) // devices
    place = lambda of: place_slots_on_nodes(of, config.n_group, mesh.node, mesh.expert, slots)
    placed = {name: np.apply_along_axis(place, -1, np.asarray(of, float)) for name, of in load.items()}
    weights = {c: flatten_dict(variables[c]) for c in ("params", SCALES, TURNED) if c in variables}
    placement = {}
    for collection in weights.values():
        for path in [path for path in collection if "experts" in path]:
            held, w = placed[path[0]], collection[path]
            stacked = held.ndim == 2
            collection[path] = w[np.arange(len(w))[:, None], held] if stacked else w[held]
            found = [slots_of_experts(h, experts, redundant) for h in held.reshape(-1, experts + redundant)]
            for name, values in zip(("slot_of", "copies"), zip(*found, strict=True), strict=True):
                placement[(*path[:-1], name)] = jnp.asarray(np.stack(values) if stacked else values[0])
    held_in_slots = {c: unflatten_dict(of) for c, of in weights.items()}
    return {**variables, **held_in_slots, EXPERT_PLACEMENT: unflatten_dict(placement)}


def slots_of_experts(held: np.ndarray, experts: int, redundant: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of each expert from the expert of each slot: (E, 1 + redundant) int32, of which `copies` (E,) are used."""
    slot_of, copies = np.zeros((experts, 1 + redundant), np.int32), np.zeros(experts, np.int32)
    for slot, expert in enumerate(held.tolist()):
        slot_of[expert, copies[expert]] = slot
        copies[expert] += 1
    return slot_of, copies


def place_slots(load: np.ndarray, devices: int, slots: int) -> np.ndarray:
    """Assigns experts to slots.

    Each slot goes to the expert with the most load per slot. Then slots are assigned to devices, busiest first, each to
    the device with the least load that has room, preferably one without that expert.

    Args:
      load: (E,) tokens per expert.
      slots: per device; devices * slots >= E.

    Returns:
      (devices * slots,) int32, the experts in slots, by device. Every expert has at least one slot.
    """
    experts = len(load)
    copies = np.ones(experts, int)
    for _ in range(devices * slots - experts):
        share = np.where(copies < devices, load / copies, -1.0)  # more copies than devices help nobody
        copies[np.argmax(share)] += 1
    each = np.repeat(np.arange(experts), copies)
    order = np.argsort(-(load / copies)[each], kind="stable")
    held: list[list[int]] = [[] for _ in range(devices)]
    busy = np.zeros(devices)
    for expert in each[order].tolist():
        room = [d for d in range(devices) if len(held[d]) < slots]
        device = min(room, key=lambda d: (expert in held[d], busy[d]))
        held[device].append(expert)
        busy[device] += load[expert] / copies[expert]
    return np.array(held, np.int32).ravel()


def place_slots_on_nodes(load: np.ndarray, groups: int, nodes: int, devices: int, slots: int) -> np.ndarray:
    """`place_slots` for `devices` on each of `nodes`. Groups stay on one node if they divide evenly over nodes."""
    if nodes == 1 or groups % nodes:
        return place_slots(load, nodes * devices, slots)
    width = len(load) // groups
    of_node = place_slots(load.reshape(groups, width).sum(1), nodes, groups // nodes).reshape(nodes, -1)
    placed = []
    for held in of_node:
        experts = (held[:, None] * width + np.arange(width)).ravel()
        placed.append(experts[place_slots(load[experts], devices, slots)])
    return np.concatenate(placed).astype(np.int32)
