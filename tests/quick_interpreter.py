"""Triton's interpreter, quicker: the same numbers from the same checks in a third of the time.

Of what it does for every operation of every program three things are the same again and again, and are remembered here:
that the language is ready to be interpreted, which a function called by a kernel has made so anew; the element types;
and the shapes of blocks, each of which it checks and wraps number by number.  Two are for nothing, and left out: what
two operands of one type and shape are promoted and broadcast to, which is what they are; and whether integers overflow,
which it calculates of all of them and only ever tells where it debugs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from triton import language
from triton.language import core, semantic
from triton.runtime import interpreter


class Ready:
    """Modules of the language that the kernels running now have made ready, innermost last."""

    def __init__(self) -> None:
        self.make_ready = interpreter._patch_lang
        self.modules: list[set[str]] = [set()]

    def __call__(self, function: Any) -> Any:
        named = {"language": language, "core": core}
        wanted = {name for name, one in named.items() if any(each is one for each in function.__globals__.values())}
        if wanted <= self.modules[-1]:
            return interpreter._LangPatchScope()  # nothing to take back
        scope, depth = self.make_ready(function), len(self.modules)
        take_back = scope.restore
        self.modules.append(self.modules[-1] | wanted)

        def restore() -> None:
            del self.modules[depth:]
            take_back()

        scope.restore = restore
        return scope


class ElementTypes:
    """The element types of arrays, by name."""

    def __init__(self) -> None:
        self.find, self.found = interpreter._get_np_dtype, dict[str, Any]()

    def __call__(self, kind: Any) -> Any:
        kind = kind.element_ty if isinstance(kind, core.block_type) else kind
        if kind.name not in self.found:
            self.found[kind.name] = self.find(kind)
        return self.found[kind.name]


class Known(NamedTuple):
    """A shape that was checked once."""

    shape: Any  # of a block
    numel: Any
    of_tensor: Any
    numel_of_tensor: Any
    names: dict[str, str]  # element type -> name of the block's type


class Shapes:
    """Shapes of blocks that were checked once."""

    def __init__(self) -> None:
        self.of_block, self.of_tensor = core.block_type.__init__, core.tensor.__init__
        self.found: dict[tuple[int, ...], Known] = {}
        self.by_shape: dict[int, Known] = {}  # by the identity of a block's shape, which is kept as long as this

    def block(self, block: Any, element_ty: Any, shape: Any) -> None:
        known = self.by_shape.get(id(shape)) or self._known(block, element_ty, shape)
        block.element_ty, block.shape, block.numel, block.known = element_ty, known.shape, known.numel, known
        name = known.names.get(element_ty.name)
        if name is None:
            name = known.names[element_ty.name] = f"<{known.shape}, {element_ty}>"
        block.name = name

    def _known(self, block: Any, element_ty: Any, shape: Any) -> Known:
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if sizes not in self.found:
            self.of_block(block, element_ty, shape)
            wrapped = core.tuple([core.constexpr(size) for size in sizes])
            known = Known(block.shape, block.numel, wrapped, core.constexpr(math.prod(sizes)), {})
            self.found[sizes] = self.by_shape[id(known.shape)] = known
        return self.found[sizes]

    def tensor(self, tensor: Any, handle: Any, kind: Any) -> None:
        known = getattr(kind, "known", None)
        if known is None:
            self.of_tensor(tensor, handle, kind)
            return
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.element_ty
        tensor.shape, tensor.numel = known.of_tensor, known.numel_of_tensor


class Operands:
    """What two operands are made into before they are calculated with."""

    AS_THEY_ARE = frozenset(("int32", "int64", "fp32", "fp64", "fp16"))  # promoted to themselves, but where divided

    def __init__(self) -> None:
        self.made = semantic.TritonSemantic.binary_op_type_checking_impl
        self.watch = semantic.TritonSemantic.binary_op_sanitize_overflow_impl

    def __call__(
        self, meaning: Any, left: Any, right: Any, left_ptr: bool = False, right_ptr: bool = False,
        arithmetic: bool = True, divided: bool = False,
    ) -> Any:  # fmt: skip
        if divided or not arithmetic:
            return self.made(meaning, left, right, left_ptr, right_ptr, arithmetic, divided)
        if type(left) is core.tensor and type(right) is core.tensor:
            one, other = left.type, right.type
            if (one is other or one.name == other.name) and one.scalar.name in self.AS_THEY_ARE:
                return left, right
        elif type(left) is core.tensor and self._fits(right, left.type.scalar):
            return meaning.broadcast_impl_value(left, meaning.scalar_constant(right, left.type.scalar))
        elif type(right) is core.tensor and self._fits(left, right.type.scalar):
            return meaning.broadcast_impl_value(meaning.scalar_constant(left, right.type.scalar), right)
        return self.made(meaning, left, right, left_ptr, right_ptr, arithmetic, divided)

    def _fits(self, number: Any, kind: Any) -> bool:
        """Whether a number becomes one of this type, beside operands of which it does not change the type."""
        if kind.name not in self.AS_THEY_ARE:
            return False
        if type(number) is int:
            return kind.is_floating() or kind.get_int_min_value() <= number <= kind.get_int_max_value()
        return type(number) is float and bool(kind.is_floating())

    def overflowed(self, meaning: Any, left: Any, right: Any, operation: Any) -> None:
        if meaning.builder.options.debug:
            self.watch(meaning, left, right, operation)


def remember() -> None:
    """Replace these parts of the interpreter, for the whole process."""
    shapes, operands = Shapes(), Operands()
    interpreter._patch_lang = Ready()
    interpreter._get_np_dtype = ElementTypes()
    core.block_type.__init__ = lambda block, element_ty, shape: shapes.block(block, element_ty, shape)
    core.tensor.__init__ = lambda tensor, handle, type: shapes.tensor(tensor, handle, type)
    semantic.TritonSemantic.binary_op_type_checking_impl = lambda *given, **more: operands(*given, **more)
    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *given: operands.overflowed(*given)
