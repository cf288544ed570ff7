"""Real processes over gloo: the loss and its gradients equal those of one process."""

import json
import subprocess
import sys
import textwrap

import pytest

WORKER = textwrap.dedent(
    """
    import json, sys
    import torch
    import torch.distributed as dist
    from mmft_hf import MMFTLoss

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = json.loads(sys.argv[1])
    assert world == len(sizes)
    g = torch.Generator().manual_seed(0)
    n = sum(sizes)
    inputs = torch.randn(n, 6, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 3, (n,), generator=g)
    image_weight = torch.randn(6, 4, generator=g, dtype=torch.float64).requires_grad_()
    text_weight = torch.randn(6, 4, generator=g, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    parameters = [image_weight, text_weight, scale]

    def step(rows, loss):
        x = inputs[rows]
        losses = loss(x @ image_weight, x.tanh() @ text_weight, labels[rows], scale.exp())
        return losses["loss"], torch.autograd.grad(losses["loss"], parameters)

    start = sum(sizes[:rank])
    loss, grads = step(slice(start, start + sizes[rank]), MMFTLoss(0.3))
    for grad in grads:  # what DDP does
        dist.all_reduce(grad)
        grad /= world
    dist.destroy_process_group()
    expected_loss, expected = step(slice(0, n), MMFTLoss(0.3))
    worst = max((a - b).abs().max().item() for a, b in zip(grads, expected))
    assert max(g.abs().max().item() for g in expected) > 1e-3
    if rank == 0:
        print(json.dumps({"world": world, "loss": abs(loss.item() - expected_loss.item()), "gradient": worst}))
    """
)


@pytest.mark.distributed
@pytest.mark.parametrize("sizes", [[4, 4], [5, 2], [3, 1, 4]])
def test_loss_and_gradients_equal_one_process(tmp_path, sizes):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(sizes)}"]
    done = subprocess.run([*command, script, json.dumps(sizes)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["world"] == len(sizes)
    assert found["loss"] < 1e-12
    assert found["gradient"] < 1e-12
