"""Fixtures that several test files share."""

import os

import pytest

# The models are tiny: on a busy machine, threads that wait for each other made these tests seven
# times slower. Set before torch is imported, and for the scripts that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """A function from config values to the folder of a randomised Hugging Face model; built once,
    for reading only.
    """
    from hf_models import randomised  # takes seconds to import, and many test files do not need it

    folders = {}

    def folder(**values):
        key = tuple(sorted(values.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("hf")
            randomised(**values).save_pretrained(folders[key])
        return folders[key]

    return folder
