"""partition_specs and main.py on many devices and in several processes: virtual CPU devices, the loopback interface.

What needs more devices runs in subprocesses, so that the other tests keep their one device.
"""

import json
import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import main
from common import arrays, early, random_params
from transformer_layer import (
    decoder,
    encoder,
    init_decoder,
    init_decoder_layer,
    init_encoder,
    init_encoder_layer,
)

PROGRAM = [sys.executable, str(Path(main.__file__))]
MESHES = [(8, 1), (4, 2), (1, 8)]
SMALL = ["was", "--length", "3", "--d-model", "128", "--d-ff", "64", "--num-heads", "2", "--steps", "120"]

# ---- Running things --------------------------------------------------------------------------------------------------


def start(command, devices=1, stdout=subprocess.PIPE, **more):
    """A subprocess with that many virtual devices, which compiles as quickly as conftest.py has it."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "XLA_FLAGS": flags, **more}
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, encoding="utf-8", env=environment)


def free_port():
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(*arguments, devices=1, terminal=False):
    """main.py as two processes that meet on the loopback interface; process 0 may write to a terminal.

    Returns the processes and what to read the output of process 0 from.
    """
    here = f"127.0.0.1:{free_port()}"
    meet = [*PROGRAM, *arguments, "--coordinator", here, "--num-processes", "2", "--process-id"]
    environment = {"devices": devices, "JAX_COORDINATOR_BIND_ADDRESS": here}
    reading, writing = pty.openpty() if terminal else os.pipe()
    processes = [start([*meet, "0"], stdout=writing, **environment), start([*meet, "1"], **environment)]
    os.close(writing)
    return processes, open(reading, encoding="utf-8", errors="replace")


def read(lines, until=None):
    """The text up to the first line that contains `until`, or up to the end."""
    text = ""
    try:
        for line in lines:
            text += line
            if until is not None and until in line:
                return text
    except OSError:  # how the end of a terminal reads on Linux
        pass
    assert until is None, text
    return text


def finished(process, seconds=180):
    """What a process printed, once it has ended well."""
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    return output


@early
def report():
    """What `probe`, at the end of this file, finds on 8 devices."""
    modules = os.pathsep.join((str(Path(main.__file__).parent), str(Path(__file__).parent)))
    return json.loads(finished(start([sys.executable, __file__], devices=8, JAX_ENABLE_X64="1", PYTHONPATH=modules)))


@early
def eight_devices():
    """The output of a training run on 8 devices."""
    return finished(start([*PROGRAM, *SMALL, "--model-parallel", "2"], devices=8))


@early
def two_processes():
    """The outputs of the same run as two processes of 2 devices each, the first of which writes to a terminal."""
    processes, lines = start_two(*SMALL, "--model-parallel", "2", devices=2, terminal=True)
    with lines:
        output = read(lines).replace("\r\n", "\n")
    finished(processes[0])
    return output, finished(processes[1])


# ---- partition_specs, read off the shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize("init", [init_encoder_layer, init_decoder_layer])
def test_heads_and_d_ff_are_split_and_nothing_else(init):
    """The specs put "model" on the axis of length h or d_ff of each leaf that has one, in a layer and in a stack."""
    layer = jax.eval_shape(lambda: init(jax.random.key(0), 6, 3, 5))  # the four axes d, h, k, f differ: 6, 3, 2, 5
    stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((7, *leaf.shape), leaf.dtype), layer)

    def expected(leaf):
        split = [axis for axis, size in enumerate(leaf.shape) if size in (3, 5)]
        return P(*[None] * split[0], "model") if split else P()

    for tree in (layer, stack, {"model": stack, "moments": {"mean": layer}}):
        assert main.partition_specs(tree) == jax.tree.map(expected, tree)
        assert jax.tree.structure(main.partition_specs(tree)) == jax.tree.structure(tree)


# ---- README's table of scale -----------------------------------------------------------------------------------------


def scale_table():
    """README's table: what the specs mean for models that nothing here could hold, from `jax.eval_shape` alone.

    "model" gets as many of the devices as there are heads. A leaf whose split axis is summed over in its einsum (output
    over h, w2 over f) leaves an all-reduce of a d_model-vector for each token.
    """

    def stack(init, *sizes):
        return jax.eval_shape(lambda: init(jax.random.key(0), *sizes))

    models = []
    for name, sizes, symbols in (("base", (6, 512, 8, 2048), 37_000), ("big", (6, 1024, 16, 4096), 37_000)):
        layers = {"encoder": stack(init_encoder, *sizes), "decoder": stack(init_decoder, *sizes)}
        models.append((f"the paper's {name}", sizes, symbols, layers))
    sizes = 80, 8192, 64, 36_864
    models.append(("70 billion: 80 causal layers", sizes, 32_000, {"encoder": stack(init_encoder, *sizes)}))
    rows = []
    for name, (_, d_model, num_heads, _), symbols, layers in models:
        params = {"embedding": jax.ShapeDtypeStruct((symbols, d_model), np.float32), **layers}
        leaves = jax.tree.leaves(params)
        split = ["model" in spec for spec in jax.tree.leaves(main.partition_specs(params))]
        row = [name, f"{sum(leaf.size for leaf in leaves) / 1e6:,.0f} M"]
        for devices in (1, 8, 512):
            parts = min(devices, num_heads)
            held = sum(leaf.size // parts if cut else leaf.size for leaf, cut in zip(leaves, split, strict=True))
            row.append(f"{4 * held / 1e9:,.2f} GB")
        summed = []
        for tree in layers.values():
            paths = jax.tree.leaves_with_path(main.partition_specs(tree))
            summed.append(sum(path[-1].key in ("output", "w2") and "model" in spec for path, spec in paths))
        row.append(" and ".join(f"{4 * d_model * count / 1e3:.1f}" for count in summed) + " kB")
        rows.append("| " + " | ".join(row) + " |")
    return rows


def test_readme_states_the_table_that_the_specs_give():
    """The rows of README's table of scale are those computed from the shapes and the specs, to the last digit."""
    readme = (Path(main.__file__).parent / "README.md").read_text(encoding="utf-8")
    section = readme.split("## More devices, more machines\n")[1].split("\n## ")[0]
    assert len(section.rstrip().splitlines()) < 25
    assert [line for line in section.splitlines() if line.startswith("| ")][2:] == scale_table()


# ---- 8 devices: the layers -------------------------------------------------------------------------------------------


def encode_and_decode(params, x, y):
    memory = encoder(params["encoder"], x)
    return memory, decoder(params["decoder"], y, memory)


def outputs_and_gradient(params, x, y):
    def scalar(params):
        outputs = encode_and_decode(params, x, y)
        return sum((weight * output).sum() for weight, output in zip((x, y), outputs, strict=True)), outputs

    gradient, outputs = jax.grad(scalar, has_aux=True)(params)
    return {"outputs": outputs, "gradient": gradient}


def probe():
    """Run in a subprocess of 8 devices: for each mesh, numbers against one device, shares and collectives, as JSON."""
    params = {
        "encoder": random_params(init_encoder, 2, 16, 8, 32, seed=1),
        "decoder": random_params(init_decoder, 2, 16, 8, 32, seed=2),
    }
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    x, y = arrays((8, 5, 16), (8, 6, 16), dtype=np.float64)
    expected = jax.jit(outputs_and_gradient)(params, x, y)
    report = {}
    for shape in MESHES:
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        places = jax.tree.map(lambda spec, mesh=mesh: NamedSharding(mesh, spec), main.partition_specs(params))
        rows = NamedSharding(mesh, P("data"))
        inputs, outputs = (places, rows, rows), {"outputs": rows, "gradient": places}
        placed = jax.device_put((params, x, y), inputs)
        forward = jax.jit(encode_and_decode, in_shardings=inputs, out_shardings=rows).lower(params, x, y).compile()
        both = jax.jit(outputs_and_gradient, in_shardings=inputs, out_shardings=outputs).lower(params, x, y).compile()
        actual = both(*placed)
        actual["outputs alone"], compare = forward(*placed), {**expected, "outputs alone": expected["outputs"]}
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(placed[0]):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.size
        whole = sum(leaf.size for leaf in jax.tree.leaves(params))
        names = "all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"
        report[str(shape)] = {
            "differences": {
                name: max(
                    float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(np.asarray(b))))
                    for a, b in zip(jax.tree.leaves(actual[name]), jax.tree.leaves(compare[name]), strict=True)
                )
                for name in compare
            },
            "shares": [size / whole for size in held.values()],
            "collectives": {
                which: {name: len(re.findall(rf" {name}(?:-start)?\(", program.as_text())) for name in names}
                for which, program in (("forward", forward), ("with gradient", both))
            },
        }
    jax.config.update("jax_enable_x64", False)  # main.train is for float32
    rows = NamedSharding(jax.make_mesh((8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2), P("data"))
    model = jax.eval_shape(lambda: main.init_model(jax.random.key(0), 11, 1, 16, 8, 32))
    train = jax.jit(main.train, static_argnames=("shape", "sharding"))
    train = train.lower(
        model, jax.eval_shape(main.init_adam, model), jax.random.key(0), (1, 2), shape=(8, 6), sharding=rows
    )
    report["train"] = len(re.findall(r" all-reduce(?:-start)?\(", train.compile().as_text()))
    print(json.dumps(report))


@pytest.mark.parametrize("shape", MESHES)
def test_many_devices_give_the_numbers_of_one(report, shape):
    """Encoder and decoder stacks on 8 devices, forward and gradient, are the single-device numbers, in float64."""
    for name, difference in report[str(shape)]["differences"].items():
        assert difference < 1e-11, name


@pytest.mark.parametrize("shape", MESHES)
def test_each_device_holds_its_share_of_the_parameters(report, shape):
    """Each device holds 1/N of the split leaves and all of the few others (7% here, by the small d_model)."""
    shares = report[str(shape)]["shares"]
    assert len(shares) == 8
    np.testing.assert_allclose(shares, 1 / shape[1], atol=0.07)


@pytest.mark.parametrize("shape", MESHES)
def test_the_program_sums_after_each_sublayer_and_gathers_nothing(report, shape):
    """The HLO of a forward pass has one all-reduce for each sub-layer, 2 and 3, and none where nothing is split.

    Neither it nor the gradient has another collective: no weight is gathered. The gradient is summed over "data".
    """
    collectives = report[str(shape)]["collectives"]
    assert collectives["forward"].pop("all-reduce") == (5 if shape[1] > 1 else 0)
    assert collectives["with gradient"].pop("all-reduce") > (5 if shape[1] > 1 else 0)
    assert set(collectives["forward"].values()) | set(collectives["with gradient"].values()) == {0}


def test_training_strings_are_made_where_they_are_used(report):
    """`train` splits its random strings over "data": the gradients of 8 devices are summed, so none saw them all."""
    assert report["train"] > 0


# ---- 8 devices and two processes: the program ------------------------------------------------------------------------


def final_loss(output):
    return float(re.findall(r"step +120  loss +([\d.]+)", output)[-1])


def test_training_on_many_devices_learns_the_same(monkeypatch, capsys, eight_devices, two_processes):
    """8 devices, and two processes of 2, show the mesh, reverse the text and end at the single-device loss."""
    monkeypatch.setattr(sys, "argv", ["main.py", *SMALL])
    main.main()
    one_device = capsys.readouterr().out
    for output, mesh, share in (
        (one_device, "data 1 x model 1", r"100\.0"),
        (eight_devices, "data 4 x model 2", r"5\d\.\d"),
        (two_processes[0], "data 2 x model 2", r"5\d\.\d"),
    ):
        assert re.search(rf"^mesh: {mesh}; on each device +{share}%$", output, re.MULTILINE)
        assert "output  saw\n" in output
        assert final_loss(output) == pytest.approx(final_loss(one_device), abs=2e-3)


def test_process_0_alone_prints(two_processes):
    """Of two processes, the other one writes nothing; that process 0 writes to a terminal makes no difference."""
    assert two_processes[0].count("4. Result") == 1
    assert two_processes[1] == ""


def end(process, seconds):
    """The exit status of a process and its standard error, which both must be there within so many seconds."""
    try:
        errors = process.communicate(timeout=seconds)[1]
    finally:
        process.kill()
    return process.returncode, errors


@early
def lost_processes():
    """Of two processes at work the first is killed, of two others the second: how each of the rest ended."""
    pairs = [start_two("--length", "4", "--steps", "1000000", "TEXT") for _ in range(2)]
    try:
        for victim, until in enumerate(("1. Parameters", "3. Training")):
            processes, lines = pairs[victim]
            read(lines, until=until)
            processes[victim].kill()
        return [end(processes[1 - victim], 60) for victim, (processes, _) in enumerate(pairs)]
    finally:
        for processes, lines in pairs:
            for process in processes:
                process.kill()
                process.communicate()
            lines.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other(lost_processes, victim):
    """When one of two processes is killed at work, the other ends within a minute, non-zero, and says why."""
    status, errors = lost_processes[victim]
    assert status not in (0, None)
    # The first sentence is ours, where JAX lets a collective fail; the second JAX's, where its runtime is faster.
    assert re.search(r"^main\.py: process \d of 2 lost another one|another task died", errors, re.MULTILINE)
    if victim == 1:
        assert (status, len(errors.splitlines()), "Traceback" in errors) == (1, 1, False)


@early
def lonely_processes():
    """How process 0 and process 1 end, each without the other: (address, status, standard error)."""
    processes = {}
    for process_id in ("0", "1"):
        here = f"127.0.0.1:{free_port()}"
        arguments = ["--coordinator", here, "--num-processes", "2", "--process-id", process_id, "--timeout", "2"]
        processes[here] = start([*PROGRAM, *arguments], JAX_COORDINATOR_BIND_ADDRESS=here)
    return [(here, *end(process, 30)) for here, process in processes.items()]


@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_without_the_others_gives_up(lonely_processes, process_id):
    """Without a coordinator, or with nobody else, a process ends after --timeout with one sentence and status 1."""
    here, status, errors = lonely_processes[process_id]
    assert (status, errors) == (1, f"main.py: not all processes have met at {here} within 2 s\n")


def test_distributed_without_a_cluster():
    """--distributed where JAX finds no cluster ends with one sentence and status 1."""
    status, errors = end(start([*PROGRAM, "--distributed"]), 60)
    assert status == 1
    assert re.fullmatch(r"main\.py: cannot join the other processes: .*\n", errors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-parallel", "0"], "argument --model-parallel: must be an integer from 1 to 2^31 - 1, got '0'"),
        (["--model-parallel", "3"], "--model-parallel must divide the number of devices, got 3 and 8"),
        (["--model-parallel", "2"], "--model-parallel must divide --num-heads, got 2 and 1"),
        (
            ["--model-parallel", "4", "--num-heads", "4", "--d-ff", "6"],
            "--model-parallel must divide --d-ff, got 4 and 6",
        ),
        (["--batch-size", "12"], "--batch-size must be a multiple of 8 on this mesh, got 12"),
        *(
            (flags, "--coordinator, --num-processes and --process-id belong together, and without --distributed")
            for flags in (["--process-id", "0"], ["--coordinator", "a:1"], ["--distributed", "--num-processes", "2"])
        ),
        (
            ["--coordinator", "here", "--num-processes", "2", "--process-id", "0"],
            "--coordinator must be HOST:PORT, got 'here'",
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id must be below --num-processes, got 2 and 2",
        ),
    ],
)
def test_a_bad_mesh_is_refused(monkeypatch, capsys, arguments, message):
    """Sizes that do not divide, and flags that do not fit together, end with status 2 and one sentence."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"main.py: {message}\n")


if __name__ == "__main__":
    probe()
