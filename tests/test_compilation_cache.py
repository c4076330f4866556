"""Where compiled programs are kept, unless the user says otherwise."""

import jax
import pytest

from dsv3_jax.compilation_cache import keep_compiled_programs

OPTIONS = (
    *("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_compilation_cache_max_size"),
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def options():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield lambda **new: [jax.config.update(name, value) for name, value in new.items()]
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_cache_directory(options, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options(jax_compilation_cache_dir=None)
    assert str(tmp_path / "dsv3_jax/compiled") in keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "dsv3_jax/compiled")
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 1  # JAX's default, too long for small programs


def test_what_the_user_chose(options, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options(jax_compilation_cache_dir=None, jax_persistent_cache_min_compile_time_secs=3)
    keep_compiled_programs()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 3
    options(jax_compilation_cache_dir=str(tmp_path))
    assert str(tmp_path) in keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    options(jax_enable_compilation_cache=False)
    assert "aren't kept" in keep_compiled_programs()
