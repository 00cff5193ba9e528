"""partition_specs and main.py on 8 virtual devices of the CPU, and in two local processes."""

import collections
import functools
import os
import re
import socket

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import main
from common import cpu_mesh, finished, many_devices, placed, random_params, run_here, start
from transformer_layer import init_decoder_layer, init_encoder_layer

SMALL = ["was", "--d-ff", "64", "--num-heads", "2", "--batch-size", "16", "--steps", "30"]


# Like the state of an optax optimizer: attributes and lists, in which some leaves are named like parameters.
OptimizerState = collections.namedtuple("OptimizerState", ["b1", "moments"])


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


def test_leaves_that_only_share_a_name_are_replicated():
    """Numbers, random keys, and arrays with too few axes get P(), whatever their names."""
    leaves = {"b1": np.float32(0.9), "w1": 0.1, "w2": 3, "output": np.ones((8, 8)), "query": jax.random.key(0)}
    leaves["key"] = jax.random.split(jax.random.key(0), (3, 2))
    assert main.partition_specs(leaves) == dict.fromkeys(leaves, P())


@functools.cache
def programs(shape):
    """Logits and gradient, compiled for a mesh of this shape, and their inputs: tokens, most of them with padding."""
    with jax.enable_x64(True):
        params = random_params(main.init_model, 11, 2, 16, 8, 32, dtype=np.float64)
        tokens = np.random.default_rng(0).integers(0, 11, (2, 8, 6))
        inputs = placed(cpu_mesh(*shape), params, tokens[0, :, 1:], tokens[1])
        params_split, batch_split, _ = jax.tree.map(lambda leaf: leaf.sharding, inputs)
        forward = jax.jit(main.model, out_shardings=batch_split).lower(*inputs).compile()
        gradient = jax.jit(jax.grad(main.loss), out_shardings=params_split).lower(*inputs).compile()
        return forward, gradient, inputs


@many_devices
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_many_devices_agree_with_one(shape):
    """Logits and gradients on 8 devices equal those on one device, in float64, and no device gathers a weight.

    Each of the two loop bodies has one all-reduce for each sub-layer, 2 and 3, and none if no parameters are split.
    The gradient is also summed over "data". There is no other collective.
    """
    (*one_device, inputs), (*many, placed) = programs((1, 1)), programs(shape)
    for program, expected in zip(many, one_device, strict=True):
        for a, b in zip(jax.tree.leaves(program(*placed)), jax.tree.leaves(expected(*inputs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * abs(np.asarray(b)).max())
    forward, gradient = (re.findall(r" ([a-z-]+?)(?:-start)?\(", program.as_text()) for program in many)
    assert forward.count("all-reduce") == (5 if shape[1] > 1 else 0)
    assert gradient.count("all-reduce") > (5 if shape[1] > 1 else 0)
    assert not {"all-gather", "all-to-all", "collective-permute", "reduce-scatter"} & {*forward, *gradient}


@many_devices
def test_generate_and_clip_on_a_mesh():
    """`generate` inside `jax.shard_map` writes the same tokens, and a sharded gradient gets the same norm."""
    params = random_params(main.init_model, 11, 2, 16, 8, 32)
    params["decoder"]["feed_forward_norm"]["scale"][-1] = -1  # otherwise it repeats one token
    source = np.random.default_rng(0).integers(0, 11, (8, 6))
    expected = jax.jit(lambda: main.generate(params, source, 5))()
    assert len(np.unique(expected)) > 1
    mapped = jax.shard_map(
        lambda params, source: main.generate(params, source, 5),
        mesh=cpu_mesh(8, 1),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    np.testing.assert_array_equal(jax.jit(mapped)(params, source), expected)
    split, _ = placed(cpu_mesh(1, 8), params, source)
    clip = jax.jit(main.clip)
    for actual, alone in zip(jax.tree.leaves(clip(split)), jax.tree.leaves(clip(params)), strict=True):
        np.testing.assert_allclose(actual, alone, rtol=1e-6)


@many_devices
def test_no_steps_on_a_mesh(monkeypatch):
    """Each device along "data" gets its share of a batch. `--steps 0` trains nothing, and shows no mistakes."""
    batches = []
    monkeypatch.setattr(main, "time_forward", lambda params, source, target, mesh: batches.extend((source, target)))
    output = run_here(monkeypatch, *SMALL, "--steps", "0", shape=(4, 2))
    assert "3. Training: skipped (--steps 0)\n\n4. " in output
    assert "exact matches: 0/64 (final parameters)\n\n5." in output
    assert [batch.sharding.shard_shape(batch.shape) for batch in batches] == [(4, 4), (4, 4)]


def test_two_processes_learn_what_one_learns(monkeypatch):
    """Two processes with two devices each, as `srun` starts them, train like one process. Only the first prints."""
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
    assert losses(first) == pytest.approx(losses(run_here(monkeypatch, *SMALL)), abs=2e-3)
    assert not re.search(r"^\d\. |^step|^params", second, re.MULTILINE)
