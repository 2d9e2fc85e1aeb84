"""The recurrence over lines as an ONNX function; importing this needs onnxscript (the extra `gspn2[onnx]`).

The text of this function is read and translated, not run.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Sequence

from onnxscript import BOOL, FLOAT, graph, script, values
from onnxscript import opset18 as op

_gspn2 = values.Opset("gspn2", 1)


@script(_gspn2, default_opset=op)
def scan_lines(u: FLOAT, w: FLOAT, restart: BOOL, reads: Sequence[int], writes: Sequence[int]) -> FLOAT:
    """h_i = w_i h_(i-1) + u_i, line by line: u (L, B, G, C, P), w (L, B, G, 1, 3, P), restart (L,).

    `reads` and `writes`: directions of ONNX's Scan, of the three inputs and of the output; 0 is from the
    first line, 1 from the last.
    """

    @graph()
    def line(h, u_i, w_i, restart_i):
        # No difference of equals: that of infinities is NaN.
        zero = op.CastLike(op.ConstantOfShape(op.Shape(u_i)), u_i)
        kept = op.Where(restart_i, zero, h)
        edge = op.Slice(zero, [0], [1], [3])
        low = op.Concat(edge, op.Slice(kept, [0], [-1], [3]), axis=3)
        high = op.Concat(op.Slice(kept, [1], [9223372036854775807], [3]), edge, axis=3)
        w_low, w_same, w_high = op.Split(w_i, num_outputs=3, axis=3)
        axis = op.Constant(value_ints=[3])
        state = op.Add(
            op.Add(
                op.Add(op.Mul(op.Squeeze(w_low, axis), low), op.Mul(op.Squeeze(w_same, axis), kept)),
                op.Mul(op.Squeeze(w_high, axis), high),
            ),
            u_i,
        )
        hidden = op.Identity(state)
        return state, hidden

    start = op.Gather(u, op.Constant(value_int=0), axis=0)
    _last, hidden = op.Scan(
        start,
        u,
        w,
        restart,
        body=line,
        num_scan_inputs=3,
        scan_input_directions=reads,
        scan_output_directions=writes,
    )
    return hidden
