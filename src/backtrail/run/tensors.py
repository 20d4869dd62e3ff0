"""States and batches as safetensors files.

The format holds no pickles, so opening a run from an untrusted source executes no code.
"""

import hashlib
import json
import re
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from backtrail.errors import BadBatch
from backtrail.step.state import State
from backtrail.task.task import Batch
from backtrail.tree import Tree, tree_flatten_with_path, tree_map

# The default `repr` of an object contains its address, which differs from process to process.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def pack_state(state: State) -> bytes:
    """Serialise a state as the bytes of a safetensors file.

    Tensors are labelled `param:NAME`, `buffer:NAME` and `moment:KEY:NAME`.
    """
    tensors: Tree = {}
    for name, tensor in state.params.items():
        tensors[f"param:{name}"] = tensor
    for name, tensor in state.buffers.items():
        tensors[f"buffer:{name}"] = tensor
    for name, moments in state.moments.items():
        for key, tensor in moments.items():
            tensors[f"moment:{key}:{name}"] = tensor
    # A safetensors file is sorted by name, and sums over a state depend on the order of its
    # tensors. So the order of the model is stored beside them.
    order = json.dumps(list(tensors))
    return save(_without_sharing(tensors), metadata={"order": order})


def _without_sharing(tensors: Tree) -> Tree:
    """Contiguous tensors, no two of which share memory.

    safetensors requires both, and a buffer may be a view of a parameter.
    """
    separate: Tree = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        address = contiguous.untyped_storage().data_ptr()
        if address in addresses:
            contiguous = contiguous.clone()
        separate[name] = contiguous
        addresses.add(address)
    return separate


def unpack_state(content: bytes) -> State:
    """Return the state that `pack_state` serialised."""
    state = State({}, {}, {})
    tensors = load(content)
    for label in _stored_order(content):
        kind, _, name = label.partition(":")
        match kind:
            case "param":
                state.params[name] = tensors[label]
            case "buffer":
                state.buffers[name] = tensors[label]
            case _:
                key, _, parameter = name.partition(":")
                state.moments.setdefault(parameter, {})[key] = tensors[label]
    return state


def _stored_order(content: bytes) -> list[str]:
    """Labels in the order in which they were packed, from the metadata of the file."""
    # A safetensors file begins with the length of its header (8 bytes, little endian), then the
    # header as JSON.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    order: list[str] = json.loads(header["__metadata__"]["order"])
    return order


def pack_batches(batches: tuple[Batch, ...]) -> bytes:
    """Serialise the batches of one step as the bytes of a safetensors file.

    A batch is made of nested tuples, lists and dicts of tensors and plain values. Their structure
    is stored as JSON in a tensor of bytes.

    Raises:
        BadBatch: a batch holds something else.
    """
    tensors: Tree = {}

    def describe(value: Any) -> Any:
        match value:
            case Tensor():
                number = len(tensors)
                tensors[str(number)] = value.detach().contiguous()
                return {"tensor": number}
            case dict():
                return {"dict": [[describe(key), describe(item)] for key, item in value.items()]}
            # Not a subclass such as a named tuple, which could not be rebuilt.
            case tuple() | list() if type(value) in {tuple, list}:
                return {type(value).__name__: [describe(item) for item in value]}
            case None | bool() | int() | float() | str():
                return {"plain": value}
        raise BadBatch(type(value).__name__)

    structure = json.dumps([describe(batch) for batch in batches]).encode()
    tensors["structure"] = torch.frombuffer(bytearray(structure), dtype=torch.uint8)
    return save(tensors)


def unpack_batches(content: bytes) -> tuple[Batch, ...]:
    """Return the batches that `pack_batches` serialised."""
    tensors = load(content)
    structure = json.loads(bytes(tensors["structure"].numpy()))

    def build(description: dict[str, Any]) -> Any:
        ((kind, value),) = description.items()
        match kind:
            case "tensor":
                return tensors[str(value)]
            case "dict":
                return {build(key): build(item) for key, item in value}
            case "plain":
                return value
        items = [build(item) for item in value]
        return tuple(items) if kind == "tuple" else items

    return tuple(build(description) for description in structure)


def digest(batch: Batch) -> str:
    """Content hash of a batch: its structure, and dtype, shape and bytes of every tensor.

    >>> digest((torch.zeros(2), 1)) == digest((torch.zeros(2), 1))
    True
    """
    sha = hashlib.sha256()
    leaves, _ = tree_flatten_with_path(batch)
    for path, leaf in leaves:
        sha.update(str(path).encode())
        if isinstance(leaf, Tensor):
            sha.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            sha.update(_bytes_of(leaf))
        else:
            sha.update(_ADDRESS.sub("", repr(leaf)).encode())
    return sha.hexdigest()[:16]


def _bytes_of(tensor: Tensor) -> bytes | memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return b""
    # Through a view of bytes: NumPy has no bfloat16.
    return flat.view(torch.uint8).numpy().data


def cpu_copy(batch: Batch) -> Batch:
    """Copy a batch to the CPU, so that later changes in place do not reach the copy."""

    def copy(leaf: Any) -> Any:
        return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf

    return tree_map(copy, batch)
