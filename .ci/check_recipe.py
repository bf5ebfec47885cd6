"""Renders the conda recipe as conda's builders do, without a channel: `python .ci/check_recipe.py`.

A field that does not exist, a value of a wrong type or an undefined variable is an error. What the recipe says is
compared with the package's metadata by the tests.
"""

from __future__ import annotations

from pathlib import Path

import rattler_build

RECIPE = Path(__file__).resolve().parent.parent / ".github" / "conda" / "recipe.yaml"

if __name__ == "__main__":
    (variant,) = rattler_build.Stage0Recipe.from_file(RECIPE).render()
    package, build = variant.recipe.package, variant.recipe.build
    print(f"{package.name} {package.version}, build {build.to_dict()['string']}")
