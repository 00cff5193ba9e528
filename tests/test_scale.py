"""partition_specs and main.py on 8 virtual devices of the CPU, and in two local processes."""

import functools
import os
import re
import socket
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import main
from common import arrays, finished, many_devices, random_params, run_here, start
from transformer_layer import decoder, encoder, init_decoder, init_decoder_layer, init_encoder, init_encoder_layer

MESHES = [(8, 1), (4, 2), (1, 8)]
SMALL = ["was", "--d-ff", "64", "--num-heads", "2", "--batch-size", "16", "--steps", "30"]


class OptimizerState(NamedTuple):
    """Like the state of an optax optimizer: attributes and lists, in which some leaves are named like parameters."""

    b1: jax.ShapeDtypeStruct
    moments: list


@pytest.mark.parametrize("init", [init_encoder_layer, init_decoder_layer])
def test_heads_and_d_ff_are_split_and_nothing_else(init):
    """The axis of length h or d_ff of a leaf is split over "model", in a layer, a stack, and Adam's moments."""
    layer = jax.eval_shape(lambda: init(jax.random.key(0), 6, 3, 5))  # the four axes d, h, k, f differ: 6, 3, 2, 5
    stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((7, *leaf.shape), leaf.dtype), layer)

    def expected(leaf):
        split = [axis for axis, size in enumerate(leaf.shape) if size in (3, 5)]
        return P(*[None] * split[0], "model") if split else P()

    optimizer_state = OptimizerState(stack["feed_forward"]["b1"], [layer, {"m": stack}])
    for tree in (layer, stack, {"model": stack}, optimizer_state):
        assert main.partition_specs(tree) == jax.tree.map(expected, tree)
    norm = layer["feed_forward_norm"]["scale"]
    assert main.partition_specs([norm, (norm,)]) == [P(), (P(),)]


@many_devices
def test_leaves_that_only_share_a_name_are_replicated():
    """Numbers, random keys, and arrays with too few axes get P(), whatever their names, and can be placed."""
    leaves = {"b1": np.float32(0.9), "w1": 0.1, "w2": 3, "output": np.ones((8, 8)), "query": jax.random.key(0)}
    leaves["key"] = jax.random.split(jax.random.key(0), (3, 2))
    specs = main.partition_specs(leaves)
    assert specs == dict.fromkeys(leaves, P())
    mesh = jax.make_mesh((4, 2), ("data", "model"), 2 * (AxisType.Auto,), devices=jax.devices("cpu")[:8])
    jax.device_put(leaves, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})


def outputs(params, x, y):
    """Memory and output of an encoder and a decoder."""
    memory = encoder(params["encoder"], x)
    return memory, decoder(params["decoder"], y, memory)


def loss(params, x, y):
    """A number that depends on every element of both outputs."""
    return sum((weight * output).sum() for weight, output in zip((x, y), outputs(params, x, y), strict=True))


@functools.cache
def programs(shape):
    """Outputs and gradient, compiled for a mesh of this shape, and their inputs, placed on it."""
    with jax.enable_x64(True):
        params = {
            "encoder": random_params(init_encoder, 2, 16, 8, 32, seed=1),
            "decoder": random_params(init_decoder, 2, 16, 8, 32, seed=2),
        }
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        inputs = params, *arrays((8, 5, 16), (8, 6, 16), dtype=np.float64)
        types = {"axis_types": 2 * (AxisType.Auto,), "devices": jax.devices("cpu")[: np.prod(shape)]}
        mesh = jax.make_mesh(shape, ("data", "model"), **types)
        batch_split = NamedSharding(mesh, P("data"))
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), main.partition_specs(params))
        placed = jax.device_put(inputs, (shardings, batch_split, batch_split))
        forward = jax.jit(outputs, out_shardings=batch_split).lower(*placed).compile()
        gradient = jax.jit(jax.grad(loss), out_shardings=shardings).lower(*placed).compile()
        return forward, gradient, placed


@many_devices
@pytest.mark.parametrize("shape", MESHES)
def test_many_devices_agree_with_one(shape):
    """Outputs and gradients of encoder and decoder on 8 devices equal those on one device, in float64."""
    (*one_device, inputs), (*many, placed) = programs((1, 1)), programs(shape)
    for program, expected in zip(many, one_device, strict=True):
        for a, b in zip(jax.tree.leaves(program(*placed)), jax.tree.leaves(expected(*inputs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * abs(np.asarray(b)).max())


@many_devices
def test_the_model_with_padding_agrees_with_one_device():
    """Loss, gradient and generated tokens of strings of mixed lengths, on 8 devices and on one, in float64."""
    sources = np.random.default_rng(0).integers(0, 11, (8, 5))  # 0 is END: most rows are padded
    targets = np.random.default_rng(1).integers(0, 11, (8, 4))

    def everything(params, sources, targets):
        return jax.value_and_grad(main.loss)(params, sources, targets), main.generate(params, sources, 4)

    with jax.enable_x64(True):
        params = random_params(main.init_model, 11, 1, 8, 2, 16)
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        mesh = jax.make_mesh((4, 2), ("data", "model"), 2 * (AxisType.Auto,), devices=jax.devices("cpu")[:8])
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), main.partition_specs(params))
        batch_split = NamedSharding(mesh, P("data"))
        placed = jax.device_put((params, sources, targets), (shardings, batch_split, batch_split))
        actual, expected = (jax.jit(everything)(*inputs) for inputs in (placed, (params, sources, targets)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), actual, expected)


@many_devices
@pytest.mark.parametrize("shape", MESHES)
def test_the_program_sums_after_each_sublayer_and_gathers_nothing(shape):
    """The two loop bodies have one all-reduce for each sub-layer, 2 and 3, and none if no parameters are split.

    There is no other collective, so no weight is gathered. The gradient is also summed over "data".
    """
    forward, gradient, _ = programs(shape)

    def count(program, name):
        return len(re.findall(rf" {name}(?:-start)?\(", program.as_text()))

    assert count(forward, "all-reduce") == (5 if shape[1] > 1 else 0)
    assert count(gradient, "all-reduce") > (5 if shape[1] > 1 else 0)
    for name in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert count(forward, name) == count(gradient, name) == 0


def test_two_processes_learn_what_one_learns(monkeypatch):
    """Two processes with two devices each, started with the variables of `srun`, have the same losses as one process.

    Only the first one prints.
    """
    with socket.socket() as listener:  # JAX derives the port from the Slurm job ID, so use a free port as the ID
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    flags = re.sub(r"--\S+device_count=\d+", "", os.environ["XLA_FLAGS"])
    slurm = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2", **slurm}
    arguments = *SMALL, "--model-parallel", "2", "--distributed"
    first, second = finished(*(start(*arguments, SLURM_PROCID=i, SLURM_LOCALID=i, **environment) for i in ("0", "1")))

    def losses(output):
        return [float(loss) for loss in re.findall(r"^step +\d+  loss +([\d.]+)", output, re.MULTILINE)]

    assert len(losses(first)) == 6
    assert losses(first) == pytest.approx(losses(run_here(monkeypatch, *SMALL, one_device=True)), abs=2e-3)
    assert not re.search(r"^\d\. |^step|^params", second, re.MULTILINE)
