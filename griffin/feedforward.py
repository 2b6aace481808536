"""Where the feedforward (FF) blocks of a model are, found by the names of their projections.

In every supported architecture the activations z are the input of the output projection, so a block is fully
described by its input projections and its output projection: nothing of the model's own forward is rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin.views import OneDNNLinear


class UnsupportedModelError(ValueError):
    """The model has a feedforward block that cannot be pruned; the message names the module."""


class Layout(NamedTuple):
    """The attribute names under which a family of architectures keeps an FF block; see `FeedForwardBlock`."""

    inputs: tuple[str, ...]
    output: str
    parts: int = 1


LAYOUTS = (
    Layout(("gate_proj", "up_proj"), "down_proj"),  # llama, mistral, gemma, qwen, stablelm, olmo2, cohere, granite
    Layout(("gate_up_proj",), "down_proj", parts=2),  # phi3, glm
    Layout(("fc1",), "fc2"),  # opt, phi
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),  # gpt-neox, falcon, bloom
    Layout(("c_fc",), "c_proj"),  # gpt2, starcoder2
)

# Attribute names under which mixture-of-experts layers keep their routed experts.
_ROUTED = ("experts", "router")

# Attribute names that, where set, make an activation depend on the other neurons (a quantile over all of them), or let
# the forward go around the output projection.
_COUPLED = ("activation_sparsity", "slow_but_exact")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (nn.Linear.forward, Conv1D.forward, OneDNNLinear.forward)

# On a CPU, columns of a matrix with more numbers than this are gathered by `torch.gather`, which uses all threads.
LARGE = 2**22


def weight_out_in(module: nn.Module) -> Tensor:
    """The weight of a projection as a view [out, in], whichever way round the module stores it."""
    weight: Tensor = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


def gather(weight: Tensor, dim: int, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """`index_select` of a matrix, by all threads of a CPU where that is slow otherwise."""
    if dim == 1 and weight.device.type == "cpu" and weight.numel() > LARGE and weight.is_contiguous():
        return torch.gather(weight, 1, rows.expand(len(weight), -1), out=out)
    return torch.index_select(weight, dim, rows, out=out)


@dataclass(frozen=True, eq=False)
class FeedForwardBlock:
    """One FF block of a model: z = act(x W1^T + b1) or act(x Wg^T) * (x Wu^T), and the output z Wd^T + b2."""

    name: str  # of the module that holds the projections, as in `model.named_modules()`
    inputs: tuple[nn.Module, ...]  # gate before up; a single one where the block is plain or fused
    output: nn.Module  # its input is z [.., D]
    parts: int  # D-wide matrices stacked in each input projection (2: fused gate and up)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """All projections, the output's last."""
        return (*self.inputs, self.output)

    @property
    def weights(self) -> list[nn.Parameter]:
        """Their matrices."""
        return [module.get_parameter("weight") for module in self.projections]

    @cached_property
    def width(self) -> int:
        """D, the number of neurons of the dense block."""
        return weight_out_in(self.output).shape[1]

    def output_columns(self, neurons_K: Tensor) -> Tensor:
        """What these neurons write by [H, K]: their columns of the output projection."""
        weight = self.output.get_parameter("weight").detach()
        columns = gather(weight, 1 - isinstance(self.output, Conv1D), neurons_K.to(weight.device))
        return columns.T if isinstance(self.output, Conv1D) else columns

    @cached_property
    def input_norms(self) -> Tensor:
        """[D] float32: per neuron, the product over the input matrices of its weight row's L2 norm."""
        rows = [part for module in self.inputs for part in weight_out_in(module).detach().chunk(self.parts, dim=0)]
        return torch.stack([_norms(part, 1) for part in rows]).prod(dim=0)

    @cached_property
    def output_norms(self) -> Tensor:
        """[D] float32: per neuron, the L1 norm of its column of the output projection."""
        return _norms(weight_out_in(self.output).detach(), 0, order=1)

    @cached_property
    def output_lengths(self) -> Tensor:
        """[D] float32: per neuron, the L2 norm of its column of the output projection."""
        return _norms(weight_out_in(self.output).detach(), 0)


def _norms(matrix: Tensor, dim: int, order: int = 2) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, ord=order, dim=dim, dtype=torch.float32)
    return norms


def find_feedforward_blocks(model: nn.Module) -> list[FeedForwardBlock]:
    """The FF blocks of a `transformers` causal language model, one per decoder layer, in layer order.

    Raises:
        UnsupportedModelError: a decoder layer is a mixture of experts, has no block of a known layout or more
            than one, or a projection is not a plain floating-point matrix in memory (quantised, adapted, offloaded).
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = []
    for layer in _decoder_layers(model):
        for module in layer.modules():
            _refuse_attributes(module, names[module])
        found = [block for module in layer.modules() if (block := _block_at(module, names[module])) is not None]
        if not found:
            known = "; ".join(f"{' + '.join(layout.inputs)} -> {layout.output}" for layout in LAYOUTS)
            raise UnsupportedModelError(
                f"no feedforward block of a known layout in {names[layer]!r} ({type(layer).__name__}); known: {known}"
            )
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{names[layer]!r} holds {len(found)} feedforward blocks "
                f"({', '.join(repr(block.name) for block in found)}); one per layer is supported"
            )
        blocks.append(found[0])
    return blocks


def _refuse(module: nn.Module, name: str, why: str) -> NoReturn:
    raise UnsupportedModelError(f"{name!r} ({type(module).__name__}) {why}")


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers: its outermost module list of the length that the config names."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers language model")
    count = config.get_text_config(decoder=True).num_hidden_layers
    decoder: nn.Module = getattr(model, "get_decoder")()  # noqa: B009 (nn.Module declares its attributes as tensors)
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} decoder layers")


def _refuse_attributes(module: nn.Module, name: str) -> None:
    if any(hasattr(module, attribute) for attribute in _ROUTED):
        _refuse(module, name, "is a mixture of experts; only dense feedforward blocks are pruned")
    for attribute in _COUPLED:
        if value := getattr(module, attribute, None):
            _refuse(module, name, f"has {attribute}={value}: its neurons do not act on their own")


def _block_at(module: nn.Module, name: str) -> FeedForwardBlock | None:
    """The block whose projections are direct children of `module`, if there is one."""
    children = dict(module.named_children())
    for layout in LAYOUTS:
        if all(attribute in children for attribute in (*layout.inputs, layout.output)):
            inputs = tuple(children[attribute] for attribute in layout.inputs)
            block = FeedForwardBlock(name, inputs, children[layout.output], layout.parts)
            for attribute in (*layout.inputs, layout.output):
                _refuse_unplain(children[attribute], f"{name}.{attribute}")
            for attribute, projection in zip(layout.inputs, inputs, strict=True):
                rows, wanted = weight_out_in(projection).shape[0], block.width * layout.parts
                if rows != wanted:
                    _refuse(projection, f"{name}.{attribute}", f"has {rows} outputs; {layout.output!r} needs {wanted}")
            _refuse_between(block, children)
            return block
    return None


def _refuse_unplain(projection: nn.Module, name: str) -> None:
    weight = getattr(projection, "weight", None)
    known = isinstance(projection, nn.Linear | Conv1D)
    plain = isinstance(weight, nn.Parameter) and weight.dtype in _DTYPES and weight.dim() == 2 and not weight.is_meta
    if not known or not plain:
        state = f"{weight.dtype}, {weight.device.type}" if isinstance(weight, Tensor) else "no weight"
        why = "is not a plain floating-point projection in memory"
        _refuse(projection, name, f"[{state}] {why}; quantised, adapted or offloaded projections cannot be pruned")
    if type(projection).forward not in _PLAIN and not _is_linear(projection):
        _refuse(projection, name, "does not compute x W^T + b; it cannot be pruned")


@torch.no_grad()
def _is_linear(projection: nn.Module) -> bool:
    """Whether a projection with a forward of its own does what its weight and bias say, tried on one input."""
    weight: Tensor = weight_out_in(projection)
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device).unsqueeze(0)
    said = nn.functional.linear(x, weight, getattr(projection, "bias", None))
    done: Tensor = type(projection).forward(projection, x)  # past the hooks of whoever has some on it
    return bool(torch.allclose(done, said, rtol=1e-2, atol=1e-2 * float(said.abs().max())))


def _refuse_between(block: FeedForwardBlock, children: dict[str, nn.Module]) -> None:
    """Refuse a block with something as wide as its neurons between them and the output projection (a norm)."""
    for attribute, child in children.items():
        shapes = [parameter.shape for parameter in child.parameters(recurse=False)]
        between = child not in block.projections and (block.width,) in shapes
        if between and block.width != weight_out_in(block.output).shape[0]:
            _refuse(child, f"{block.name}.{attribute}", "acts on all neurons at once; the block cannot be pruned")
