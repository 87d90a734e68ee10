"""A graph that never ends."""

from __future__ import annotations

import numpy as np
from bundles import image_encoder_onnx
from onnx import TensorProto, helper, load_from_string, numpy_helper


def endless_encoder(*, constant: bool) -> bytes:
    """An image encoder that goes round 2^62 times, over a constant or over what it is fed."""
    value, flag = TensorProto.FLOAT, TensorProto.BOOL
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go_on_"]),
            helper.make_node("Add", ["sum", "one"], ["sum_"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", flag, []),
            helper.make_tensor_value_info("sum", value, ["n", 3]),
        ],
        [
            helper.make_tensor_value_info("go_on_", flag, []),
            helper.make_tensor_value_info("sum_", value, ["n", 3]),
        ],
        [numpy_helper.from_array(np.array([1e-9], np.float32), "one")],
    )
    model = load_from_string(image_encoder_onnx())
    graph = model.graph
    start = "zero" if constant else "channels"
    loop = [helper.make_node("Loop", ["rounds", "true", start], ["looped"], body=body)]
    if constant:
        loop.append(helper.make_node("Add", ["channels", "looped"], ["summed"]))
    nodes = list(graph.node)
    nodes[2].input[0] = loop[-1].output[0]
    del graph.node[:]
    graph.node.extend([*nodes[:2], *loop, *nodes[2:]])
    constants = {"rounds": np.array(2**62), "true": np.array(True), "zero": np.zeros((1, 3), "f4")}
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
    data: bytes = model.SerializeToString()
    return data
