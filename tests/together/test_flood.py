"""A flood beside a tenant with a guarantee: one service, two workers, real processes, and a tiny model."""

from pathlib import Path

from flood_drive import PHASES, Driver, Load
from flood_node import ANN, FLOOD, Cluster, Sizes
from tiny_models import tiny_llama, tiny_tokenizer
from ttft_models import Texts

from kvprefetch.engines.load import LoadedModel
from kvprefetch.engines.selftest import page_shape

LOAD = Load(phases_s=(2.5, 6.0, 1.5), documents=2, document=256, question=15, pause_s=0.8, floods=3, flood=(300, 500))


def test_a_flood_fails_no_request_and_takes_nothing_of_whoever_is_within_its_guarantee(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tiny_llama(eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = Sizes(page_shape(tiny, 1).bytes, pool=1_280, arena=1_280, block=16, guarantee=0.5)
    told = list[str]()
    with Cluster(str(tmp_path / "model"), sizes) as cluster:
        scene = Driver(cluster, Texts(tiny, 0), LOAD).run(
            lambda: told.append(cluster.operate("tenants", "set", ANN, "--guarantee", "60%"))
        )
        cluster.prove()  # every slot and every page
    assert not scene.failed
    assert "60.0%" in told[0]
    assert scene.changed is not None
    assert scene.flooded[0] < scene.changed[0] < scene.changed[1] < scene.flooded[1]
    assert all(scene.ttfts(phase) for phase in PHASES)
    assert sum(each.prompt for each in scene.of(FLOOD, "during")) > 4 * sizes.pool
    assert scene.evictions > 0
    assert scene.reused("before") == 1.0
    assert scene.reused("during") >= 0.98  # by ann's own credential, the same flood leaves a fifth
