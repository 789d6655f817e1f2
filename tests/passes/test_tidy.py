import numpy as np
from graphs import graph

from deploycc.passes._tidy import complete_names, name_by_module, tidy

BODY = "(float[2,4] x) => (float[2,6] y) { a = Relu(x) b = MatMul(a, w) y = Sigmoid(b) }"


def labelled(*names: str):
    model = graph(BODY, w=np.ones((4, 6), np.float32))
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    return model


def test_blank_and_shared_names():
    model = labelled("", "same", "same")
    complete_names(model)
    assert [node.name for node in model.graph] == ["Relu", "same", "same_1"]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_a_blank_name_never_takes_one_that_is_there():
    model = labelled("", "Relu", "Sigmoid")
    complete_names(model)
    names = [node.name for node in model.graph]
    assert len(set(names)) == 3


def test_unnamed_values_are_called_after_their_nodes():
    model = labelled("", "", "")
    model.graph[0].outputs[0].name = None
    complete_names(model)
    assert model.graph[0].outputs[0].name == "Relu_out"


def test_descriptions_and_dead_code_go():
    model = labelled("r", "m", "s")
    model.doc_string, model.producer_version, model.graph.doc_string = "secret", "9", "secret"
    model.metadata_props["path"] = model.graph.metadata_props["path"] = "/home/me"
    model.graph[0].doc_string = "secret"
    for value in (model.graph.inputs[0], model.graph.initializers["w"], model.graph[0].outputs[0]):
        value.doc_string = "secret"
        value.metadata_props["path"] = "/home/me"
    tidy(model)
    text = str(model)
    assert "secret" not in text
    assert "/home" not in text
    assert (model.producer_name, model.producer_version, model.graph.name) == ("deploycc", None, "main")


def test_names_from_the_module_tree():
    model = labelled("node_12", "node_MatMul_13", "node_14")
    scopes = "['', 'block', 'block.act', 'relu_1']", "['', 'head', 'linear']", "['', 'sigmoid']"
    for node, scope in zip(model.graph, scopes, strict=True):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scope
    model.graph.initializers["w"].name = "val_7"
    name_by_module(model)
    assert [node.name for node in model.graph] == ["block.act/Relu", "head/MatMul", "Sigmoid"]
    assert [value.name for node in model.graph for value in node.outputs] == ["block.act/Relu_out", "head/MatMul_out", "y"]
    assert list(model.graph.initializers) == ["head/MatMul.weight"]


def test_a_layer_is_called_like_its_weight():
    model = labelled("a", "b", "/head/Sigmoid")
    model.graph.initializers["w"].name = "head.weight"
    name_by_module(model)
    assert [node.name for node in model.graph] == ["a", "head", "head/Sigmoid"]
