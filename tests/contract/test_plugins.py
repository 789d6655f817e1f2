"""One contract over every plug-in, by discovery."""

import dataclasses
import inspect
import re

import pytest

from deploycc.core import target as targets
from deploycc.core.artifact import Form
from deploycc.core.contract import TARGET_PARTS, Backend, DataSource, FormOps, ModelSource, Pass
from deploycc.core.pipeline import Pipeline
from deploycc.core.registry import BACKENDS, DATASETS, FORMS, MODELS, PASSES, ROOT, Registry, summary
from deploycc.core.spec import format_spec
from deploycc.errors import DeployError, UnknownName
from deploycc.manual import attribute_docs, backend_manual, device_manual, list_devices, pass_manual, source_manual, target_manual
from deploycc.package.runner import RUNNERS, Runner
from deploycc.remote.addresses import LINKS
from deploycc.remote.transport import Link


@pytest.mark.parametrize("name", PASSES.names())
class TestPass:
    def test_is_a_frozen_dataclass_named_like_its_file(self, name):
        cls = PASSES.get_class(name)
        assert issubclass(cls, Pass)
        assert dataclasses.is_dataclass(cls)
        with pytest.raises(dataclasses.FrozenInstanceError):
            cls().anything = 1  # type: ignore[attr-defined]
        assert cls.name == name

    def test_declares_forms_and_effect(self, name):
        cls = PASSES.get_class(name)
        assert cls.consumes <= set(Form)
        assert cls.consumes
        assert cls.produces is None or cls.produces in Form
        assert cls.effect.tolerance is None or 0 <= cls.effect.tolerance <= 0.01
        assert cls.reads <= {"calibration", "training", "validation"}
        assert cls.decided_by <= TARGET_PARTS

    def test_declares_every_part_of_the_target_that_it_reads(self, name):
        folder = ROOT / "passes"
        source = (folder / f"{name.replace('-', '_')}.py").read_text()
        parts = set(re.findall(r"target\.(backend|arch|hardware|runtime|quant)\b", source))
        assert parts <= PASSES.get_class(name).decided_by

    def test_its_text_round_trips(self, name):
        body = PASSES.get(name)
        for text in (format_spec(body), format_spec(body, full=True)):
            assert Pipeline.parse(text).steps[0].body == body

    def test_has_a_manual_that_explains_every_option(self, name):
        cls = PASSES.get_class(name)
        assert len(summary(cls)) > 20
        text = pass_manual(name)
        for field in dataclasses.fields(cls):
            assert field.name in attribute_docs(cls), f"{field.name} is not in the Attributes of {cls.__name__}"
            assert field.name.replace("_", "-") in text

    def test_alternatives_are_other_settings_of_itself(self, name):
        body = PASSES.get(name)
        target = targets.load("x86-onnxruntime")
        for other in (*body.alternatives(target), *body.retreats(), *body.faster()):
            assert type(other) is type(body)
            assert other != body


@pytest.mark.parametrize("name", targets.names())
class TestTarget:
    def test_its_pipeline_ends_in_what_its_backend_takes(self, name):
        target = targets.load(name)
        backend = BACKENDS.get(target.backend)
        assert Pipeline.parse(target.pipeline).check(Form.MODULE) in backend.accepts

    def test_its_text_says_where_its_hardware_ends(self, name):
        target = targets.load(name)
        assert len(target.title) > 10
        assert f'arch = "{target.arch}"' in target_manual(name)


@pytest.mark.parametrize("name", BACKENDS.names())
class TestBackend:
    def test_fits_the_protocol(self, name):
        backend = BACKENDS.get(name)
        assert isinstance(backend, Backend)
        assert backend.accepts <= set(Form)
        available = backend.available()
        assert available or (available.missing and available.install)

    def test_every_constraint_is_a_rule_with_a_fix(self, name):
        constraints = BACKENDS.get(name).constraints()
        assert constraints
        for constraint in constraints:
            rule, _, fix = inspect.cleandoc(constraint.__doc__ or "").partition("\n")
            assert rule.endswith(".")
            assert fix.strip()
            assert rule in backend_manual(name)


@pytest.mark.parametrize("name", FORMS.names())
def test_every_form_fits_the_protocol(name):
    assert isinstance(FORMS.get(name), FormOps)
    assert name in {form.value for form in Form}


def test_every_form_has_its_file():
    assert set(FORMS.names()) == {form.value for form in Form}


@pytest.mark.parametrize("name", LINKS.names())
def test_every_way_to_a_device_fits_the_protocol(name):
    link = LINKS.get(name)
    assert isinstance(link, Link)
    available = link.available()
    assert available or (available.missing and available.install)
    assert link.syntax.startswith(f"{name}://")
    assert link.syntax in device_manual(name)
    assert link.syntax in list_devices()


@pytest.mark.parametrize(("registry", "protocol"), [(MODELS, ModelSource), (DATASETS, DataSource)])
def test_every_source_fits_its_protocol(registry, protocol):
    for name in registry.names():
        source = registry.get(name)
        assert isinstance(source, protocol)
        assert source.syntax
        assert source.syntax in source_manual(name)


@pytest.mark.parametrize("name", RUNNERS.names())
def test_every_runner_fits_its_protocol(name):
    runner = RUNNERS.get(name)
    assert isinstance(runner, Runner)
    assert len(summary(type(runner))) > 20


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownName) as caught:
        PASSES.get("quantise-static")
    assert "did you mean 'quantize-static'" in caught.value.fix
    with pytest.raises(UnknownName, match="no source 'onix'"):
        source_manual("onix")


def test_a_plug_in_without_the_name_of_its_file_fails_loudly(tmp_path, monkeypatch):
    import deploycc.passes as package
    from deploycc.core import registry

    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "my_pass.py").write_text("class Other:\n    name = 'other'\n")
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    monkeypatch.setattr(package, "__path__", [str(tmp_path / "passes")])
    with pytest.raises(DeployError, match="holds no class with name = 'my-pass'"):
        Registry("passes", "pass", Pass, "`deploycc passes`").get("my-pass")
