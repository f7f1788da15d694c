"""Every form of M rows on the real path: stock loaders read it, and it says what it is."""

from pathlib import Path

import pytest

from coterie import compress
from coterie.compress.recipes import ROUTERS
from coterie.profile.profile import Profile
from coterie.testing import check_result
from some import first


@pytest.mark.parametrize(
    ("recipe", "router"),
    first(
        2,
        [
            ("average", "map"),
            ("reap", "refit"),
            *(("average", router) for router in sorted(ROUTERS) if router != "map"),
        ],
    ),
)
def test_a_result_of_any_form_is_whole(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, recipe: str, router: str
) -> None:
    result = compress(olmoe, tmp_path / "out", experts=4, recipe=recipe, router=router, profile=olmoe_profile)
    check_result(olmoe, result)
    assert result.manifest.router == result.plan.router == router
    assert result.manifest.loads_with == ("coterie" if router == "map" else "transformers")
    for layer in result.manifest.layers:
        notes = layer.notes
        assert ("refit-router" in notes) == (router == "refit")
        if router == "refit":
            assert notes["refit-router"]["heldout_error_refit"] <= notes["refit-router"]["heldout_error_before"]
