"""Methods and their settings as other programs give them."""

import pytest

from vlmfix.integrations.spec import files_digest, joined, read


def test_settings_belong_to_the_last_method_and_misspelt_ones_are_refused():
    assert joined("var", {"rho": 0.5}, ()) == "var:rho=0.5"
    assert joined("'pai+var:p=0.4'", {"rho": 0.5, "skip_last": False}, ()) == "pai+var:p=0.4,rho=0.5,skip_last=false"
    assert joined("'var:p=0.4,rho=0.8'", {}, ()) == "var:p=0.4,rho=0.8"
    assert read(joined("var", {"skip_last": False}, ()))[0].skip_last is False
    with pytest.raises(ValueError, match="rhoo: no setting of var and no option; did you mean 'rho'"):
        joined("var", {"rhoo": 0.5}, ("pretrained",))
    with pytest.raises(ValueError, match="did you mean 'pretrained'"):
        joined("none", {"pretraned": "x"}, ("pretrained",))


def test_files_are_told_by_their_content(tmp_path):
    heads = tmp_path / "heads.json"
    heads.write_text("1")
    spec = f"headgain:head_list={heads}"
    first = files_digest(spec, read(spec))
    heads.write_text("2")
    assert first and files_digest(spec, read(spec)) not in (first, None)
    assert files_digest("headgain:head_list=L1H0", read("headgain:head_list=L1H0")) is None
