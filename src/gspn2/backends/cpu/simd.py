"""Short vectors inside Numba: a value type that is one LLVM vector, and the few operations the scan needs.

Numba leaves vectorisation to LLVM, which has to prove that buffers do not overlap and adds a scalar tail to
every loop; lines of 14 places spend their time there. With vectors as values the kernel says what it means.
LANES lanes are one AVX-512 register of float32; LLVM splits them where registers are shorter.

Pointers are Numba's `CPointer`: no bounds, no wrap-around, offsets in elements. Storage in 16 bits is told
from its pointer: uint16 holds bfloat16, int16 holds float16; both are widened to float32 in registers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import models, overload, register_model

from .constants import LANES

# Numba's decorator changes the signature (the typing context goes), which its annotations do not say.
intrinsic: Any = numba_intrinsic

_I1, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))


class Vector(types.Type):
    """LANES values of one float type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"vector({dtype} x {LANES})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(manager.lookup(vector.dtype).get_value_type(), LANES))


def _llvm_vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _float_type(context: Any, dtype: types.Float) -> ir.Type:
    return context.get_value_type(dtype)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    one = builder.insert_element(ir.Constant(_llvm_vector(value.type), ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, LANES), [_I32(0)] * LANES))


def _lanes_where(builder: ir.IRBuilder, relation: str, number: ir.Value) -> ir.Value:
    """Mask of the lanes whose own number is in this relation to `number` (int64, within int32)."""
    iota = ir.Constant(_llvm_vector(_I32), [_I32(lane) for lane in range(LANES)])
    return builder.icmp_signed(relation, iota, _splat(builder, builder.trunc(number, _I32)))


def _bits(element: ir.Type) -> int:
    return 64 if isinstance(element, ir.DoubleType) else 16 if element == _I16 else 32


def _short(element: ir.Type) -> str:
    """LLVM's spelling of a vector of this element in the name of an intrinsic."""
    letter = "i" if isinstance(element, ir.IntType) else "f"
    return f"v{LANES}{letter}{_bits(element)}"


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [arg.type for arg in args]), name
    )
    return builder.call(function, args)


def _vector_pointer(builder: ir.IRBuilder, pointer: ir.Value, offset: ir.Value, element: ir.Type) -> ir.Value:
    address = builder.gep(pointer, [offset])
    return builder.bitcast(address, ir.PointerType(_llvm_vector(element)))


def _load(
    builder: ir.IRBuilder, pointer: ir.Value, offset: ir.Value, element: ir.Type, count: ir.Value | None
) -> ir.Value:
    """LANES elements from an address aligned to one; with `count` only the first, the others 0."""
    address = _vector_pointer(builder, pointer, offset, element)
    if count is None:
        loaded = builder.load(address)
        loaded.align = _bits(element) // 8
        return loaded
    vector = _llvm_vector(element)
    args = [address, _I32(_bits(element) // 8), _lanes_where(builder, "<", count), ir.Constant(vector, None)]
    return _call(builder, f"llvm.masked.load.{_short(element)}.p0", vector, args)


def _store(
    builder: ir.IRBuilder,
    value: ir.Value,
    pointer: ir.Value,
    offset: ir.Value,
    element: ir.Type,
    count: ir.Value | None,
) -> None:
    address = _vector_pointer(builder, pointer, offset, element)
    if count is None:
        builder.store(value, address).align = _bits(element) // 8
        return
    args = [value, address, _I32(_bits(element) // 8), _lanes_where(builder, "<", count)]
    _call(builder, f"llvm.masked.store.{_short(element)}.p0", ir.VoidType(), args)


def _like(value: ir.Value, element: ir.Type) -> ir.Type:
    """A vector of `element` where `value` is a vector, else `element`."""
    return _llvm_vector(element) if isinstance(value.type, ir.VectorType) else element


def _constant(like: ir.Type, number: int) -> ir.Constant:
    if isinstance(like, ir.VectorType):
        return ir.Constant(like, [like.element(number)] * LANES)
    return ir.Constant(like, number)


def _widen(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """As stored to the arithmetic type; one value or a vector of them."""
    if storage == types.uint16:
        bits = _like(value, _I32)
        high = builder.shl(builder.zext(value, bits), _constant(bits, 16))
        return builder.bitcast(high, _like(value, ir.FloatType()))
    if storage == types.int16:
        half = builder.bitcast(value, _like(value, ir.HalfType()))
        return builder.fpext(half, _like(value, ir.FloatType()))
    return value


def _narrow(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """The arithmetic type to storage, to nearest even, NaN stays NaN; one value or a vector of them."""
    if storage == types.int16:
        return builder.bitcast(builder.fptrunc(value, _like(value, ir.HalfType())), _like(value, _I16))
    if storage != types.uint16:
        return value
    wide = _like(value, _I32)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, _constant(wide, 16)), _constant(wide, 1))
    rounded = builder.add(builder.add(bits, _constant(wide, 0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    high = builder.select(is_nan, _constant(wide, 0x7FC0), builder.lshr(rounded, _constant(wide, 16)))
    return builder.trunc(high, _like(value, _I16))


# --- intrinsics: each takes and returns Numba values ------------------------------------------------------


@intrinsic
def pointer_to(typingctx: Any, address: Any, like: Any) -> Any:
    """The int64 `address` as a pointer to elements of the type of the scalar `like`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), codegen


@intrinsic
def advance(typingctx: Any, pointer: Any, offset: Any) -> Any:
    """The pointer `offset` elements further on."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


@intrinsic
def splat(typingctx: Any, value: Any, like: Any) -> Any:
    """The scalar `value` in every lane, in the type of the scalar `like`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _splat(builder, context.cast(builder, args[0], value, like))

    return Vector(like)(value, like), codegen


@intrinsic
def is_double(typingctx: Any, like: Any) -> Any:
    """Is the scalar `like` a float64? Known when the kernel is compiled."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _I1(like == types.float64)

    return types.boolean(like), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the machine can."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        element = _float_type(context, signature.return_type.dtype)
        return _call(builder, f"llvm.fmuladd.{_short(element)}", args[0].type, list(args))

    return a(a, a, a), codegen


@intrinsic
def replace_lane(typingctx: Any, vector: Any, lane: Any, value: Any) -> Any:
    """The vector with lane `lane` from the vector `value`; unchanged when `lane` is none of its lanes."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        here = _lanes_where(builder, "==", args[1])
        return builder.select(here, args[2], args[0])

    return vector(vector, types.int64, vector), codegen


@intrinsic
def keep_below(typingctx: Any, vector: Any, count: Any) -> Any:
    """The vector with 0 in every lane from `count` on."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        zero = ir.Constant(args[0].type, None)
        return builder.select(_lanes_where(builder, "<", args[1]), args[0], zero)

    return vector(vector, types.int64), codegen


def _comparison(predicate: str) -> Callable[..., Any]:
    def choose(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return builder.select(builder.fcmp_ordered(predicate, args[0], args[1]), args[1], args[0])

        return a(a, a), codegen

    return choose


# A comparison with NaN is false: a NaN in the first operand stays.
lower_of = intrinsic(_comparison(">"))
upper_of = intrinsic(_comparison("<"))


@intrinsic
def round_to_int(typingctx: Any, vector: Any) -> Any:
    """Every lane to the nearest integer, still as a float."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        element = _float_type(context, signature.return_type.dtype)
        return _call(builder, f"llvm.rint.{_short(element)}", args[0].type, list(args))

    return vector(vector), codegen


@intrinsic
def two_to_the(typingctx: Any, vector: Any) -> Any:
    """2^n for lanes that hold integers n in the exponent's normal range."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        wide = signature.return_type.dtype.bitwidth == 64
        integer, bias, mantissa = (_I64, 1023, 52) if wide else (_I32, 127, 23)
        n = builder.fptosi(args[0], _llvm_vector(integer))
        exponent = builder.add(n, _splat(builder, integer(bias)))
        bits = builder.shl(exponent, _splat(builder, integer(mantissa)))
        return builder.bitcast(bits, args[0].type)

    return vector(vector), codegen


@intrinsic
def load(typingctx: Any, pointer: Any, offset: Any) -> Any:
    """LANES consecutive elements of scratch at `offset`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _load(builder, args[0], args[1], context.get_value_type(pointer.dtype), None)

    return Vector(pointer.dtype)(pointer, types.int64), codegen


@intrinsic
def store(typingctx: Any, pointer: Any, offset: Any, value: Any) -> Any:
    """Write LANES consecutive elements of scratch at `offset`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _store(builder, args[2], args[0], args[1], context.get_value_type(pointer.dtype), None)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value), codegen


@intrinsic
def load_as(typingctx: Any, source: Any, offset: Any, like: Any) -> Any:
    """LANES consecutive stored elements in the type of `like`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        loaded = _load(builder, args[0], args[1], context.get_value_type(source.dtype), None)
        return _widen(builder, loaded, source.dtype)

    return Vector(like)(source, types.int64, like), codegen


@intrinsic
def store_as(typingctx: Any, target: Any, offset: Any, value: Any) -> Any:
    """Store LANES consecutive elements in the storage type."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        lanes = _narrow(builder, args[2], target.dtype)
        _store(builder, lanes, args[0], args[1], context.get_value_type(target.dtype), None)
        return context.get_dummy_value()

    return types.void(target, types.int64, value), codegen


@intrinsic
def load_first(typingctx: Any, source: Any, offset: Any, count: Any, like: Any) -> Any:
    """The first `count` (at most LANES) of consecutive stored elements in the type of `like`, the rest 0."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        loaded = _load(builder, args[0], args[1], context.get_value_type(source.dtype), args[2])
        return _widen(builder, loaded, source.dtype)

    return Vector(like)(source, types.int64, types.int64, like), codegen


@intrinsic
def store_first(typingctx: Any, target: Any, offset: Any, count: Any, value: Any) -> Any:
    """Store the first `count` lanes (at most LANES) as consecutive elements of the storage type."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        lanes = _narrow(builder, args[3], target.dtype)
        _store(builder, lanes, args[0], args[1], context.get_value_type(target.dtype), args[2])
        return context.get_dummy_value()

    return types.void(target, types.int64, types.int64, value), codegen


@intrinsic
def load_one(typingctx: Any, source: Any, offset: Any, like: Any) -> Any:
    """One stored element in the type of `like`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _widen(builder, builder.load(builder.gep(args[0], [args[1]])), source.dtype)

    return like(source, types.int64, like), codegen


@intrinsic
def store_one(typingctx: Any, target: Any, offset: Any, value: Any) -> Any:
    """Store one value as an element of the storage type."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store(_narrow(builder, args[2], target.dtype), builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(target, types.int64, value), codegen


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """LANES vectors of LANES lanes, transposed by interleaving: log2(LANES) rounds of LANES shuffles."""
    half = LANES // 2
    low = [_I32(lane // 2 + (lane % 2) * LANES) for lane in range(LANES)]
    high = [_I32(half + lane // 2 + (lane % 2) * LANES) for lane in range(LANES)]
    low_mask, high_mask = (ir.Constant(ir.VectorType(_I32, LANES), mask) for mask in (low, high))
    for _ in range(LANES.bit_length() - 1):
        rows = [
            builder.shuffle_vector(rows[i], rows[i + half], mask)
            for i in range(half)
            for mask in (low_mask, high_mask)
        ]
    return rows


def _put(
    builder: ir.IRBuilder,
    value: ir.Value,
    pointer: ir.Value,
    offset: ir.Value,
    storage: types.Type,
    element: ir.Type,
    count: ir.Value | None,
    add: bool,
) -> None:
    if add:
        value = builder.fadd(_load(builder, pointer, offset, element, count), value)
    _store(builder, _narrow(builder, value, storage), pointer, offset, element, count)


def _transposition(masked: bool, add: bool = False, to_scratch: bool = False) -> Callable[..., Any]:
    def copy(
        typingctx: Any,
        source: Any,
        source_row: Any,
        rows: Any,
        columns: Any,
        target: Any,
        target_row: Any,
    ) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            src, src_row, n_rows, n_columns, dst, dst_row = args
            read_as, write_as = (context.get_value_type(pointer.dtype) for pointer in (source, target))
            last = builder.sub(n_rows, _I64(1))
            loaded = []
            for r in range(LANES):
                # A row past the end reads the last one again: legal, and its lanes are never stored.
                inside = builder.icmp_signed("<", _I64(r), n_rows)
                row = builder.select(inside, _I64(r), last) if masked else _I64(r)
                offset = builder.mul(row, src_row)
                value = _load(builder, src, offset, read_as, n_columns if masked else None)
                loaded.append(_widen(builder, value, source.dtype))
            for c, value in enumerate(_transposed(builder, loaded)):
                offset = builder.mul(_I64(c), dst_row)
                if not masked:
                    _put(builder, value, dst, offset, target.dtype, write_as, None, add)
                    continue
                with builder.if_then(builder.icmp_signed("<", _I64(c), n_columns)):
                    count = n_rows
                    if to_scratch:
                        # A whole vector: a load soon after would wait for a masked store.
                        kept = _lanes_where(builder, "<", n_rows)
                        value = builder.select(kept, value, ir.Constant(value.type, None))
                        count = None
                    _put(builder, value, dst, offset, target.dtype, write_as, count, add)
            return context.get_dummy_value()

        counts = (types.int64,) * 3
        return types.void(source, *counts, target, types.int64), codegen

    return copy


# Copy, or add, a block of `rows` x `columns` elements (at most LANES each) transposed, converting meanwhile.
# The unmasked forms take full blocks only and ignore the two counts; the one for scratch fills rows with 0.
copy_block_transposed = intrinsic(_transposition(masked=False))
copy_part_transposed = intrinsic(_transposition(masked=True))
copy_part_to_scratch = intrinsic(_transposition(masked=True, to_scratch=True))
add_block_transposed = intrinsic(_transposition(masked=False, add=True))
add_part_transposed = intrinsic(_transposition(masked=True, add=True))


def _arithmetic(instruction: str) -> Callable[..., Any]:
    def apply(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return getattr(builder, instruction)(*args)

        return a(a, a), codegen

    return apply


def _register(operation: Callable[..., Any], instruction: str) -> None:
    apply = intrinsic(_arithmetic(instruction))
    # Lambdas, because Numba wants both signatures alike to the annotation.
    overload(operation)(lambda a, b: (lambda a, b: apply(a, b)) if isinstance(a, Vector) and a == b else None)


_register(operator.add, "fadd")
_register(operator.sub, "fsub")
_register(operator.mul, "fmul")
_register(operator.truediv, "fdiv")
