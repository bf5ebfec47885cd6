"""Renders the conda recipe as conda's builders do, without a channel: `python .ci/check_recipe.py`.

An unknown field, a value of a wrong type or an undefined variable is an error. The tests compare the recipe with the
package's metadata.
"""

from __future__ import annotations

from pathlib import Path

import rattler_build

RECIPE = Path(__file__).resolve().parent.parent / ".github" / "conda" / "recipe.yaml"

if __name__ == "__main__":
    (variant,) = rattler_build.Stage0Recipe.from_file(RECIPE).render()
    package, build = variant.recipe.package, variant.recipe.build
    print(f"{package.name} {package.version}, build {build.to_dict()['string']}")
