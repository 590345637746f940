import pytest

from sgid_transforms.bulk import Shard
from sgid_transforms.errors import RecipeError


def array(this, first, last, count, step=1):
    values = {"ID": this, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def tasks(this, count):
    return {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(this), "SLURM_NTASKS": str(count)}


def ranks(this, count):
    return {"RANK": str(this), "WORLD_SIZE": str(count)}


@pytest.mark.parametrize(
    ("environ", "share"),
    [
        (array(0, 0, 7, 8), (1, 8)),
        (array(3, 1, 8, 8), (3, 8)),
        (array(20, 10, 40, 4, 10), (2, 4)),
        (array(0, 0, 0, 1), (1, 1)),
        (tasks(2, 4), (3, 4)),
        (ranks(1, 2), (2, 2)),
        (tasks(1, 2) | ranks(2, 8), (3, 8)),  # torchrun numbers its ranks itself
        (tasks(1, 4) | {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "4"}, (2, 4)),
        (array(1, 0, 2, 3) | tasks(3, 4), (8, 12)),
        # A batch script is task 0 of all, but nothing else runs it.
        (array(1, 0, 2, 3) | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (2, 3)),
        (array(1, 0, 2, 3) | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"}, (2, 3)),
    ],
)
def test_the_environment_tells_a_process_its_share(environ, share):
    assert Shard.from_environment(environ) == Shard(*share)


@pytest.mark.parametrize("layout", [(3, 1), (3, 4), (1, 5)])
def test_all_tasks_of_all_array_jobs_have_different_shares_that_cover_everything(layout):
    jobs, each = layout
    shares = [
        Shard.from_environment(array(job + 2, 2, jobs + 1, jobs) | tasks(task, each))
        for job in range(jobs)
        for task in range(each)
    ]
    assert sorted(share.number for share in shares) == list(range(1, jobs * each + 1))
    assert {share.count for share in shares} == {jobs * each}
    for key in (f"{number:08x}" for number in range(0, 2**32, 2**28 + 12345)):
        assert sum(key in share for share in shares) == 1


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {},
            "neither SLURM_ARRAY_TASK_ID, nor SLURM_PROCID of a task that srun started, nor RANK tells this process its share",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "neither SLURM_ARRAY_TASK_ID"),
        ({"SLURM_STEP_ID": "1", "SLURM_PROCID": "0"}, "SLURM_PROCID is set without SLURM_NTASKS"),
        (tasks(4, 4), "SLURM_PROCID is 4, but SLURM_NTASKS is 4"),
        ({"RANK": "1"}, "RANK is set without WORLD_SIZE"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_ID is set without SLURM_ARRAY_TASK_MIN"),
        (array("x", 0, 1, 2), "SLURM_ARRAY_TASK_ID is 'x', which is not a number"),
        (array(0, 0, 7, 3), r"the SLURM array of 3 tasks from 0 to 7 has gaps, .*use one like --array=0-2"),
        (ranks(4, 4), "RANK is 4, but WORLD_SIZE is 4"),
    ],
)
def test_what_is_missing_or_contradictory_is_refused_in_a_sentence(environ, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Shard.from_environment(environ)
    assert str(caught.value).endswith("give --shard i/n instead of auto")
