"""PagedAttention in ONNX's own operators, for ONNX Runtime's CPU provider, which lacks it."""

from pathlib import Path

import onnx
from onnx import helper, parser

DOMAIN = "tests"

FUNCTION = """
<domain: "tests", opset_import: ["": 21]>
PagedAttention (packed, key_cache, value_cache, bounds, past, table, cos, sin) => (attended, keys, values) {
    size = Constant <value_ints = [SIZE]> ()
    head = Constant <value_ints = [HEAD]> ()
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    minus = Constant <value_float = -1e30> ()
    scale = Constant <value_float = SCALE> ()
    shape = Shape (packed)
    tokens = Gather <axis = 0> (shape, zero)
    count = Squeeze (tokens)
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    place = Range (first, count, step)
    limits = Cast <to = 7> (bounds)
    columns = Unsqueeze (place, one)
    reached = LessOrEqual (limits, columns)
    passed = Cast <to = 7> (reached)
    begun = ReduceSum <keepdims = 0> (passed, one)
    row = Sub (begun, one)
    begin = Gather <axis = 0> (limits, row)
    before = Cast <to = 7> (past)
    offset = Gather <axis = 0> (before, row)
    within = Sub (place, begin)
    position = Add (offset, within)
    tables = Cast <to = 7> (table)
    blocks = Gather <axis = 0> (tables, row)
    column = Div (position, size)
    column2 = Unsqueeze (column, one)
    block2 = GatherElements <axis = 1> (blocks, column2)
    block = Squeeze (block2, one)
    rest = Mod (position, size)
    block_start = Mul (block, size)
    slot = Add (block_start, rest)
    slots = Unsqueeze (slot, one)

    heads = Constant <value_ints = [0, ALL, HEAD]> ()
    qkv = Reshape (packed, heads)
    axis1 = Constant <value_ints = [1]> ()
    q_end = Constant <value_ints = [QUERIES]> ()
    k_end = Constant <value_ints = [QUERIES_KEYS]> ()
    all_end = Constant <value_ints = [ALL]> ()
    qk = Slice (qkv, zero, k_end, axis1)
    v_new = Slice (qkv, k_end, all_end, axis1)
    turning = Cast <to = 1> (qk)
    cosines = Gather <axis = 0> (cos, position)
    sines = Gather <axis = 0> (sin, position)
    cosine1 = Cast <to = 1> (cosines)
    sine1 = Cast <to = 1> (sines)
    cosine = Unsqueeze (cosine1, one)
    sine = Unsqueeze (sine1, one)
    left, right = Split <axis = 2, num_outputs = 2> (turning)
    lc = Mul (left, cosine)
    rs = Mul (right, sine)
    ls = Mul (left, sine)
    rc = Mul (right, cosine)
    turned_left = Sub (lc, rs)
    turned_right = Add (rc, ls)
    turned = Concat <axis = 2> (turned_left, turned_right)
    queries = Slice (turned, zero, q_end, axis1)
    k_turned = Slice (turned, q_end, k_end, axis1)
    k_new = CastLike (k_turned, packed)

    flat = Constant <value_ints = [-1, KEYS, HEAD]> ()
    key_rows = Reshape (key_cache, flat)
    value_rows = Reshape (value_cache, flat)
    key_written = ScatterND (key_rows, slots, k_new)
    value_written = ScatterND (value_rows, slots, v_new)
    cache_shape = Shape (key_cache)
    keys = Reshape (key_written, cache_shape)
    values = Reshape (value_written, cache_shape)

    size0 = Constant <value_int = SIZE> ()
    inner = Range (first, size0, step)
    starts = Mul (blocks, size)
    starts3 = Unsqueeze (starts, last)
    every3 = Add (starts3, inner)
    wide = Constant <value_ints = [0, -1]> ()
    every = Reshape (every3, wide)
    k_seen = Gather <axis = 0> (key_written, every)
    v_seen = Gather <axis = 0> (value_written, every)
    k_float = Cast <to = 1> (k_seen)
    v_float = Cast <to = 1> (v_seen)
    k_by_head = Transpose <perm = [0, 2, 3, 1]> (k_float)
    v_by_head = Transpose <perm = [0, 2, 1, 3]> (v_float)
    grouped = Constant <value_ints = [0, KEYS, GROUP, HEAD]> ()
    q_by_head = Reshape (queries, grouped)
    products = MatMul (q_by_head, k_by_head)
    scores = Mul (products, scale)
    lengths = Shape <start = 1> (every)
    length = Squeeze (lengths)
    seen = Range (first, length, step)
    positions = Unsqueeze (position, one)
    hidden = Greater (seen, positions)
    axes = Constant <value_ints = [1, 2]> ()
    mask = Unsqueeze (hidden, axes)
    masked = Where (mask, minus, scores)
    weights = Softmax <axis = -1> (masked)
    mixed = MatMul (weights, v_by_head)
    together = Reshape (mixed, wide)
    attended = CastLike (together, packed)
}
"""


def decompose(folder: Path, block_tokens: int) -> None:
    """Rewrite folder/model.onnx (packed queries, keys and values, one rotary cache) for blocks of this size."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    caches = {
        value.name: value.type.tensor_type.shape.dim[3].dim_value for value in model.graph.input if "key" in value.name
    }
    [head] = set(caches.values())
    for node in model.graph.node:
        if node.op_type != "PagedAttention":
            continue
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        queries, keys = given["num_heads"], given["kv_num_heads"]
        inputs = [node.input[place] for place in (0, 3, 4, 5, 6, 7, 8, 9)]
        numbers = {"QUERIES_KEYS": queries + keys, "ALL": queries + 2 * keys, "QUERIES": queries, "KEYS": keys}
        numbers |= {"GROUP": queries // keys, "HEAD": head, "SIZE": block_tokens, "SCALE": given["scale"]}
        del node.input[:], node.attribute[:]
        node.input.extend(inputs)
        node.domain = DOMAIN
    text = FUNCTION
    for name, number in numbers.items():
        text = text.replace(name, str(number))
    model.functions.append(parser.parse_function(text))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
