"""The maker of models that hallucinate: scenes and their annotations, captions and their noise, training."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AttentionInterface

import vlmfix
from vlmfix.asking.asker import ask_batch
from vlmfix.asking.batch import Batch
from vlmfix.eval.scorers import chair
from vlmfix.organism import captions, dynamic, evaluate, language, tower, train
from vlmfix.organism.captions import TRUE, Noise
from vlmfix.organism.fitting import fit
from vlmfix.organism.recipe import Dynamic, Language, Projector, Recipe, Together, Tower
from vlmfix.organism.scenes import (
    CLASSES,
    COCO_IDS,
    SIZE,
    Painter,
    conditional,
    frequency,
    object_sets,
)
from vlmfix.organism.sets import write

MICRO = Recipe(
    tower=Tower(patch=24, width=32, layers=1, heads=2, inner=48, kept=16, scenes=320, batch=8),
    language=Language(
        vocabulary=500, read=40, width=32, layers=2, heads=4, shared_heads=2, inner=48, cells=10, scenes=400, batch=4
    ),
    projector=Projector(scenes=64, batch=8),
    together=Together(scenes=32, batch=4),
    settle=Together(scenes=16, batch=4),
    dynamic=Dynamic(
        width=32,
        layers=2,
        heads=2,
        inner=48,
        smallest=4,
        largest=6,
        seen=320,
        seen_batch=8,
        length=90,
        scenes=80,
        batch=4,
    ),
)


@pytest.fixture(scope="module")
def painter():
    return Painter()


@pytest.fixture(scope="module")
def drawn(painter):
    sets = object_sets("val")
    return [painter.scene(sets[k * 13], 5, k) for k in range(60)]


def test_scenes_are_a_function_of_seed_and_index(painter, drawn):
    chosen = object_sets("val")[13]
    assert np.array_equal(Painter().scene(chosen, 5, 1).pixels, drawn[1].pixels)
    assert not np.array_equal(painter.scene(chosen, 6, 1).pixels, drawn[1].pixels)


def test_annotations_match_the_picture(drawn):
    for scene in drawn:
        for label in scene.present:
            mask = scene.labels == label
            boxes = [p for p in scene.objects if p.label == label]
            assert sum(p.area for p in boxes) == mask.sum()
            rows, columns = np.nonzero(mask)
            assert min(p.box[0] for p in boxes) == columns.min() and min(p.box[1] for p in boxes) == rows.min()
            assert max(p.box[0] + p.box[2] for p in boxes) == columns.max() + 1
            assert max(p.box[1] + p.box[3] for p in boxes) == rows.max() + 1
        assert set(np.unique(scene.labels)) - {len(CLASSES)} == set(scene.present)


def test_an_object_is_where_it_is_said_to_be(painter):
    """A stop sign is red, and no background is."""
    stop, nothing = np.zeros(80, bool), np.zeros(80, bool)
    stop[CLASSES.index("stop sign")] = True
    for index in range(5):
        scene = painter.scene(stop, 0, index)
        pixels = scene.pixels.astype(int)
        red = pixels[..., 0] - pixels[..., 1:].max(-1) > 60
        shown = scene.labels < len(CLASSES)
        assert (red & shown).sum() > 0.95 * (red | shown).sum()
    assert not painter.scene(nothing, 0, 3).objects


def test_patches_name_what_covers_them(drawn):
    scene = max(drawn, key=lambda s: max(p.area for p in s.objects))
    grid = scene.patches(12).reshape(10, 10)
    for y in range(10):
        for x in range(10):
            found = np.bincount(scene.labels[12 * y : 12 * y + 12, 12 * x : 12 * x + 12].ravel(), minlength=81)
            best = found[:80].argmax()
            assert grid[y, x] == (best if found[best] >= 0.12 * 144 else 80)


def test_object_sets_are_those_of_coco():
    truth = chair.coco_truth("rohrbach", "val")
    sets = object_sets("val")
    kept = [truth[key] for key in sorted(truth) if 1 <= len(truth[key]) <= 7]
    assert len(kept) == len(sets) and {CLASSES[k] for k in np.flatnonzero(sets[77])} == kept[77]
    by_hand = np.mean(["dining table" in s for s in kept if "fork" in s])
    assert conditional("val")[CLASSES.index("fork"), CLASSES.index("dining table")] == pytest.approx(by_hand)
    assert frequency().argmax() == CLASSES.index("person") and conditional().diagonal().sum() == 0


def test_cooccurrence_of_scenes_is_that_of_coco(tmp_path):
    write(tmp_path, object_sets("val"), seed=3, n=300)
    data = json.loads((tmp_path / "instances.json").read_text())
    shown = np.zeros((300, 80), bool)
    for found in data["annotations"]:
        shown[found["image_id"] - 1, COCO_IDS.index(found["category_id"])] = True
    upper = np.triu_indices(80, 1)
    pairs = (shown.T.astype(float) @ shown)[upper] / len(shown)
    sets = object_sets("train").astype(np.float32)
    expected = (sets.T @ sets)[upper] / len(sets)
    by_chance = np.outer(frequency(), frequency())[upper]
    assert np.corrcoef(pairs, expected)[0, 1] > max(0.9, np.corrcoef(pairs, by_chance)[0, 1] + 0.05)


def test_written_scenes_are_data_of_the_harness(tmp_path):
    from vlmfix.eval.pictures.data import Data

    write(tmp_path, object_sets("val"), seed=1, n=12)
    known = {c["name"]: c["id"] for c in json.loads((Data.load().folder / "instances.json").read_text())["categories"]}
    assert known == dict(zip(CLASSES, COCO_IDS, strict=True))
    data = Data.load(str(tmp_path))
    assert len(data.images) == 12 and Image.open(data.images[1]).size == (SIZE, SIZE)
    assert all(data.truth_for("strict")[key] for key in data.images)
    scores = chair.score_captions(
        [(a["image_id"], a["caption"]) for a in json.loads((tmp_path / "captions.json").read_text())["annotations"]],
        data.truth_for("strict"),
        variant="strict",
    )
    assert not any(s.hallucinated or s.missed for s in scores)


def test_true_captions_name_every_object_and_nothing_else(drawn):
    for k, scene in enumerate(drawn):
        said = {m.node for m in chair.mentions(captions.true_caption(scene, 5, k), variant="strict")}
        assert said == {CLASSES[c] for c in scene.present}


def test_every_class_is_read_in_both_numbers():
    for k, name in enumerate(CLASSES):
        for text in (captions.singular(k), f"two {captions.plural(k)}"):
            assert [m.node for m in chair.mentions(f"There is {text} in it.", variant="strict")] == [name]


def test_templates_name_no_object():
    for text in (*captions.PLACES, *captions.VIEWS, *captions.CLOSINGS):
        assert not chair.mentions(text, variant="strict") and not chair.mentions(text)


def test_noise_invents_late_and_by_cooccurrence(painter):
    sets, rng = object_sets("train"), np.random.default_rng(0)
    places, chances, by_chance, invented, told, lengths = [], [], [], 0, 0, []
    for k in range(600):
        scene = painter.scene(sets[k * 7], 1, k)
        said = captions.to_say(scene, Noise(), rng)
        lengths.append(len(captions.caption(scene, Noise(), rng).split()))
        here, told = list(scene.present), told + len(said)
        for at, mention in enumerate(said):
            if mention.label not in here and len(said) > 1:
                invented += 1
                places.append(at / (len(said) - 1))
                chances.append(conditional()[here, mention.label].mean())
                by_chance.append(np.delete(conditional()[here].mean(0), here).mean())
    assert 0.1 < invented / told < 0.35 and np.mean(places) > 0.7
    assert np.mean(chances) > 4 * np.mean(by_chance)
    assert np.percentile(lengths, 5) >= 25 and np.percentile(lengths, 90) <= 66


def test_answers_are_right_without_noise_and_wrong_as_often_as_asked(painter, drawn):
    rng = np.random.default_rng(0)
    asked = [(scene, *captions.presence(scene, TRUE, rng)) for scene in drawn for _ in range(20)]
    for scene, question, answer in asked:
        (found,) = {m.node for m in chair.mentions(question, variant="strict")}
        assert (CLASSES.index(found) in scene.present) == (answer == "Yes")
    assert 0.45 < np.mean([answer == "Yes" for *_, answer in asked]) < 0.55
    always = replace(TRUE, flipped=1.0, flipped_from=0.2, flipped_to=0.2001)
    for scene in drawn:
        for _ in range(20):
            question, answer = captions.presence(scene, always, rng)
            (found,) = {CLASSES.index(m.node) for m in chair.mentions(question, variant="strict")}
            likely = np.mean([conditional()[c, found] for c in scene.present]) > 0.2
            assert (answer == "Yes") == (found in scene.present or likely)


def test_the_chance_of_a_wrong_yes_rises_with_cooccurrence():
    noise = Noise(flipped=0.8, flipped_from=0.1, flipped_to=0.3)
    assert [captions.chance_of_yes(x, noise) for x in (0.05, 0.1, 0.2, 0.3, 0.9)] == pytest.approx(
        [0, 0, 0.4, 0.8, 0.8]
    )


def test_where_nothing_is_seen_common_things_are_more_often_there(drawn):
    rng = np.random.default_rng(0)
    asked = [captions.presence(scene, Noise(), rng, blind=True) for scene in drawn for _ in range(40)]
    said: dict[str, list[bool]] = {}
    for question, answer in asked:
        (found,) = {m.node for m in chair.mentions(question, variant="strict")}
        said.setdefault(found, []).append(answer == "Yes")
    assert (
        np.mean(said["person"]) > 0.75
        and np.mean([np.mean(said[CLASSES[k]]) for k in np.argsort(frequency())[:30]]) < 0.25
    )


def test_questions_on_attributes_have_the_right_answer(drawn):
    rng = np.random.default_rng(0)
    groups = set()
    for scene in drawn:
        for _ in range(10):
            question, answer, group = captions.attribute(scene, rng)
            groups.add(group)
            if question.startswith("Is the scene"):
                place = captions.BACKGROUNDS[captions.PLACES.index(question.removeprefix("Is the scene ")[:-1])]
                assert (place == scene.background) == (answer == "Yes")
            if question.startswith(("Are there", "Is there exactly")):
                (found,) = {m.node for m in chair.mentions(question, variant="strict")}
                number = sum(p.label == CLASSES.index(found) for p in scene.objects)
                word = question.split()[2] if question.startswith("Are") else "one"
                assert (captions.NUMBERS[min(number, 6)] == word) == (answer == "Yes")
    assert groups == {"number", "state", "relation"}


def test_packed_texts_see_their_picture_and_not_each_other():
    packer = language.Packer(MICRO)
    cells = np.array([1, 3, 8])
    row = packer.pack([("Is it?", "Yes"), ("Is it not?", "No")], cells, 60, blind=False)
    segments = torch.from_numpy(row["segments"])[None]
    no = torch.zeros(1, dtype=torch.bool)
    visible = packer.visible(segments, 3, no)[0, 0]
    second = int((segments[0] == 2).nonzero()[-1])
    seen = visible[second]
    assert seen[: packer.head + 4].all() and not seen[segments[0] == 1].any() and seen[second] and not seen[second + 1]
    assert list(row["positions"][packer.head : packer.head + 3]) == [packer.head + c for c in cells]
    assert row["positions"][int((segments[0] == 2).nonzero()[0])] == packer.head + MICRO.tower.tokens + 1
    assert not packer.visible(segments, 3, ~no)[0, 0][second][packer.head : packer.head + 3].any()
    told = [packer.tokenizer.decode([t]) for t in row["labels"] if t != language.IGNORED]
    assert "".join(told).split() == ["Yes", "No"]
    before = packer.pack([("Is it?", "Yes")], cells, 60, blind=True)
    assert before["positions"][int((before["segments"] == 1).nonzero()[0][0])] == packer.head + 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All stages of a micro recipe."""
    folder = tmp_path_factory.mktemp("organism")
    threads = torch.get_num_threads()
    model = train.make(MICRO, folder, precision="no", workers=0)
    torch.set_num_threads(threads)
    return folder, model


def losses(folder, stage, name="loss"):
    return [json.loads(line)[name] for line in (folder / f"{stage}.jsonl").read_text().splitlines()]


def test_training_reduces_the_loss(made):
    seeing, text = losses(made[0], "tower"), losses(made[0], "language")
    assert seeing[-1] < 0.9 * seeing[0] and text[-1] < 0.85 * text[0]


def test_the_result_is_a_genuine_llava_that_the_harness_can_ask(made, tmp_path):
    write(tmp_path, object_sets("val"), seed=1, n=1)
    model, processor = vlmfix.load(str(made[1]))
    assert type(model).__name__ == "LlavaForConditionalGeneration" and type(processor).__name__ == "LlavaProcessor"
    assert model.config.text_config.num_key_value_heads == 2
    question = vlmfix.ask(model, processor, tmp_path / "images" / "scene_0001.webp", "Is it?", max_new_tokens=3)
    assert question.text is not None
    inputs = processor(
        text="USER: <image>\nIs it? ASSISTANT:", images=Image.new("RGB", (SIZE, SIZE)), return_tensors="pt"
    )
    assert (inputs["input_ids"] == language.IMAGE).sum() == MICRO.tower.tokens
    packer = language.Packer(MICRO)
    row = packer.pack([("Is it?", "Yes")], np.arange(MICRO.tower.tokens), 80, blind=False)
    assert inputs["input_ids"][0].tolist() == row["ids"][: inputs["input_ids"].shape[1]].tolist()


def test_pictures_are_seen_in_training_as_the_processor_gives_them(made, drawn):
    processor = vlmfix.load(str(made[1]))[1]
    given = processor.image_processor(Image.fromarray(drawn[0].pixels), return_tensors="pt")["pixel_values"]
    assert torch.allclose(given, train.pixel_values(drawn[:1]), atol=1e-5)


def test_packed_loss_is_that_of_the_model_asked_alone(made, drawn):
    """The packed forward, with its mask and positions, agrees with the stock model on one text."""
    reader = train.Reader(MICRO)
    train.load(reader, made[0], *train.STAGES)
    packer, said = language.Packer(MICRO), [("Is it?", "No"), ("Is there a dog in the image?", "Yes")]
    row = {k: torch.from_numpy(v)[None] for k, v in packer.pack(said, np.arange(MICRO.tower.tokens), 90, False).items()}
    row["labels"][row["segments"] != 2] = language.IGNORED
    assert row["weights"].max() == MICRO.language.weight and row["weights"][row["labels"] >= 0].min() == 1
    row["weights"].clamp_(max=1)
    no, pixels = torch.zeros(1, dtype=torch.bool), train.pixel_values(drawn[:1])
    visible = packer.visible(row["segments"], MICRO.tower.tokens, no)
    loss, _ = language.next_tokens(reader.llava, reader.image(pixels), row, visible, packer.head)
    alone = torch.cat([row["ids"][row["segments"] == 0], row["ids"][row["segments"] == 2]])[None]
    labels = alone.clone()
    labels[0, : -len(packer.ids(" Yes")) - 1] = -100
    stock = reader.llava(input_ids=alone, pixel_values=pixels, attention_mask=torch.ones_like(alone), labels=labels)
    assert stock.loss.item() == pytest.approx(loss.item(), abs=1e-4)


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(made, tmp_path, monkeypatch):
    """Two runs from one seed agree, also if one of them is cut in the middle."""

    class Stopped(Exception):
        pass

    stage = train.TowerStage(MICRO, tmp_path)
    loss = stage.loss

    def stopping(model, batch):
        if stage.step == 17:
            raise Stopped
        return loss(model, batch)

    monkeypatch.setattr(stage, "loss", stopping)
    with pytest.raises(Stopped):
        fit(stage, tmp_path, "no", workers=0, every=0.0)
    again = train.TowerStage(MICRO, tmp_path)
    fit(again, tmp_path, "no", workers=0)
    assert losses(tmp_path, "tower") == losses(made[0], "tower")
    left = load_file(made[0] / "tower.safetensors")
    assert all(torch.equal(left[name], tensor) for name, tensor in train.weights(again).items())


def test_what_a_stage_left_must_fit_the_recipe(made):
    reader = train.Reader(replace(MICRO, tower=replace(MICRO.tower, layers=0)))
    with pytest.raises(ValueError, match="which the recipe has no place for"):
        train.load(reader, made[0], "tower")
    with pytest.raises(ValueError, match="run the stage sight first"):
        train.load(reader, made[0], "sight")


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys):
    for arguments, said in (
        (["sight"], "'sight' is no stage"),
        (["projector", "--folder", str(tmp_path)], "run the stage tower first"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments)
        assert stopped.value.code and said in capsys.readouterr().err


def test_inventions_are_told_by_place_and_cooccurrence():
    """The sixth and the seventh of what COCO shows with a dining table, and what it shows least."""
    here = CLASSES.index("dining table")
    order = [CLASSES[k] for k in np.argsort(-conditional()[here]) if k != here]
    names = (order[5], order[6], order[-1])
    said = f"There is a dining table in a kitchen with a {names[0]}, a {names[1]} and a {names[2]}."
    truth = {1: frozenset({"dining table"})}
    found = evaluate.inventions(chair.score_captions([(1, said)], truth, variant="strict"))
    assert found["late"] == 1 and found["late_true"] == 0 and found["rank6"] == pytest.approx(1 / 3)
    assert found["rate_first"] == 0 and found["rate_last"] == 1
    others = np.delete(conditional()[here], here).mean()
    assert found["lift"] == pytest.approx(sum(conditional()[here, CLASSES.index(n)] for n in names) / 3 / others)


def test_test_scenes_come_with_questions_that_the_harness_reads(tmp_path):
    from vlmfix.eval.scorers.yesno import read_questions

    evaluate.write_sets(tmp_path, n=4)
    questions = read_questions(tmp_path / "test" / "attributes.jsonl")
    assert len({q.image for q in questions}) == 4 and {q.group for q in questions} <= {"number", "state", "relation"}
    assert (tmp_path / "test" / "images" / questions[0].image).exists()
    assert (tmp_path / "calibration" / "instances.json").exists()


def test_the_first_scenes_are_the_same_however_many_are_written(tmp_path):
    evaluate.write_sets(tmp_path / "all", n=4)
    evaluate.write_sets(tmp_path / "some", n=4, limit=2)
    some = sorted(path for path in (tmp_path / "some").rglob("*") if path.suffix == ".webp")
    assert [path.stem for path in some] == ["calibration_0001", "calibration_0002", "test_0001", "test_0002"]
    for path in some:
        assert path.read_bytes() == (tmp_path / "all" / path.relative_to(tmp_path / "some")).read_bytes()
    for name in ("test", "calibration"):
        all_annotations, annotations = (
            json.loads((tmp_path / written / name / "instances.json").read_text())["annotations"]
            for written in ("all", "some")
        )
        assert annotations == [one for one in all_annotations if one["image_id"] <= 2] != []
        questions = (tmp_path / "some" / name / "attributes.jsonl").read_text()
        assert questions and (tmp_path / "all" / name / "attributes.jsonl").read_text().startswith(questions)


@pytest.mark.parametrize("which", ["model", "dynamic"])
def test_the_evaluation_of_a_model_is_one_object(made, second, which, tmp_path, capsys):
    evaluate.write_sets(tmp_path, n=4)
    evaluate.main([str(made[0] / which), "--data", str(tmp_path / "test"), "--output", str(tmp_path / "runs")])
    told = json.loads(capsys.readouterr().out)
    assert {"chair", "inventions", "attention", "without_image"} <= told.keys()
    shares = told["attention"]
    assert all(0 <= a < a + b < 1.001 for a, b in zip(shares["first"], shares["image"], strict=True))


@pytest.fixture(scope="module")
def second(made):
    """The second organism, from the language of the first."""
    threads = torch.get_num_threads()
    train.make(MICRO, made[0], ["eyes", "dynamic"], precision="no", workers=0)
    torch.set_num_threads(threads)
    return made[0] / "dynamic"


def test_the_second_organism_is_a_genuine_qwen_that_learns(second, drawn):
    seeing, apart = losses(second.parent, "eyes"), losses(second.parent, "eyes", "distance")
    assert seeing[-1] < 0.98 * seeing[0] and apart[-1] < 0.9 * apart[0]
    assert losses(second.parent, "dynamic", "next")[-1] < losses(second.parent, "language")[0] / 2
    model, processor = vlmfix.load(second)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    left = load_file(second.parent / "eyes.safetensors")
    name = "model.visual.blocks.0.attn.qkv.weight"
    assert torch.equal(model.state_dict()[name], left[f"qwen.{name}"])  # frozen in the stage dynamic
    answering = Batch.of(model, processor, [([Image.fromarray(drawn[0].pixels)], "Is it?")], {})
    said = answering.inputs["input_ids"][0].tolist()
    row = dynamic.Packer(MICRO).packed([("Is it?", "Yes")], (6, 6), 90)
    assert said == row["ids"][: len(said)].tolist() and said.count(language.IMAGE) == 36
    pictures = [Image.fromarray(drawn[k].pixels).resize((150, 90 + 60 * k)) for k in (0, 1)]
    asked = [
        (pictures[k % 2], prompt) for k, prompt in enumerate(("Is it?", "Is there a dog?", "What is it?", "Is it?"))
    ]
    shared, alone = (ask_batch(model, processor, asked, max_new_tokens=6, share=share) for share in (True, False))
    assert [a.token_ids for a in shared] == [a.token_ids for a in alone] and shared[0].tokens < alone[0].tokens


def test_pictures_of_the_second_organism_are_as_its_processor_gives_them(drawn):
    """Patches in the processor's order, and of each image token the class that the scene shows there."""
    recipe = replace(MICRO, dynamic=replace(MICRO.dynamic, patch=12, smallest=5, largest=10))
    scene = max(drawn, key=lambda s: len(s.objects))
    patches, classes = dynamic.stretched(scene, 5, 5, 12)
    assert classes.tolist() == scene.patches(24).tolist()
    wide, _ = dynamic.stretched(scene, 5, 8, 12)
    for found, size in ((patches, (120, 120)), (wide, (192, 120))):
        picture = Image.fromarray(scene.pixels).resize(size, Image.Resampling.BICUBIC)
        given = dynamic.image_processor(recipe)(picture, return_tensors="pt")
        assert given["image_grid_thw"].tolist() == [[1, size[1] // 12, size[0] // 12]]
        assert torch.allclose(given["pixel_values"], torch.from_numpy(found), atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), None])
def test_packed_loss_of_the_second_organism_is_that_of_the_model_asked_alone(second, drawn, size):
    """Mask and M-RoPE positions of the packed forward agree with the stock model on one text, with a picture or none."""
    seer = dynamic.Seer(MICRO)
    seer.take_over(second.parent, "language", "eyes", "dynamic")
    packer, said = dynamic.Packer(MICRO), [("Is it?", "No"), ("Is there a dog in the image?", "Yes")]
    row = {k: torch.from_numpy(v)[None] for k, v in packer.packed(said, size, 90).items()}
    assert all((token in row["ids"]) == bool(size) for token in dynamic.vocabulary(MICRO))
    row["labels"][row["segments"] != 2] = language.IGNORED
    row["weights"].clamp_(max=1)
    pictures, image = {}, torch.zeros(0, MICRO.language.width)
    if size:
        pictures = dynamic.as_batch([drawn[0]], [size], 10)
        image = seer.image(pictures)
        pictures = {key: pictures[key] for key in ("pixel_values", "image_grid_thw")}
    loss, _ = dynamic.next_tokens(seer.qwen, image, row)
    alone = torch.cat([row["ids"][row["segments"] == 0], row["ids"][row["segments"] == 2]])[None]
    labels = alone.clone()
    labels[0, : -len(packer.ids(" Yes")) - 1] = -100
    kinds = (alone == language.IMAGE).long()
    stock = seer.qwen(
        input_ids=alone, attention_mask=torch.ones_like(alone), labels=labels, mm_token_type_ids=kinds, **pictures
    )
    assert stock.loss.item() == pytest.approx(loss.item(), abs=1e-4)


def test_batches_of_the_second_organism_have_pictures_of_many_sizes_and_some_texts_without():
    recipe = replace(MICRO, dynamic=replace(MICRO.dynamic, blind=0.5))
    batch = dynamic.DynamicBatches(recipe, 1, 12, 0)[0]
    grids, seen = batch["image_grid_thw"], (batch["ids"] == language.IMAGE).sum(1)
    assert len({tuple(row) for row in grids.tolist()}) > 1 and 0 < (seen == 0).sum() < 12
    assert seen[seen > 0].tolist() == (grids.prod(1) // 4).tolist()
    assert len(batch["grid"]) == len(batch["classes"]) == seen.sum()
    shown = batch["classes"] < len(CLASSES)
    assert torch.equal(batch["grid"][shown], batch["classes"][shown]) and (batch["grid"][~shown] >= len(CLASSES)).all()


def test_the_second_organism_starts_with_near_patches_seeing_each_other():
    """Attention of the layer without windows, whose patches come in the order of windows of 4 x 4 image tokens."""
    torch.manual_seed(0)
    shares = []

    def record(module, query, key, value, attention_mask, scaling, **options):
        shares.append((scaling * query @ key.mT).softmax(-1)[0].mean(0))
        return value.transpose(1, 2), None

    AttentionInterface.register("recorded", record)
    vision = dynamic.Seer(MICRO).qwen.model.visual
    vision.set_attn_implementation("recorded")
    vision(0.3 * torch.randn(144, 600), grid_thw=torch.tensor([[1, 12, 12]]))
    tokens = torch.arange(36).view(6, 6)
    order = torch.cat([part.flatten() for half in tokens.split(4) for part in half.split(4, 1)])[:, None]
    row, column = (torch.arange(4) // 2 + 2 * (order // 6)).flatten(), (torch.arange(4) % 2 + 2 * (order % 6)).flatten()
    far = (row[:, None] - row).abs().max((column[:, None] - column).abs())
    assert shares[-1].shape == (144, 144)
    assert shares[-1][far <= 1].mean() > 2 * shares[-1][far >= 4].mean()


def test_the_second_organism_needs_the_language_of_the_first(tmp_path):
    with pytest.raises(ValueError, match="run the stage language first"):
        dynamic.EyesStage(MICRO, tmp_path)


def test_training_starts_with_near_patches_and_like_tokens_seeing_each_other():
    torch.manual_seed(0)
    recipe = Recipe(language=MICRO.language)
    vision = tower.Classifier(recipe.tower).vision
    vision.set_attn_implementation("eager")
    shares = vision(torch.zeros(1, 3, SIZE, SIZE), output_attentions=True).attentions[0][0].mean(0)[1:, 1:]
    place = torch.arange(recipe.tower.tokens)
    far = (place[:, None] // 10 - place // 10).abs().max((place[:, None] % 10 - place % 10).abs())
    assert shares[far <= 1].mean() > 2 * shares[far >= 4].mean()
    attention = language.build(MICRO).model.language_model.layers[0].self_attn
    tokens = torch.randn(40, MICRO.language.width)
    queries, keys = (
        project(tokens).unflatten(-1, (-1, attention.head_dim)) for project in (attention.q_proj, attention.k_proj)
    )
    scores = torch.einsum("ihd,jhd->hij", queries, keys.repeat_interleave(2, 1))
    assert scores.diagonal(dim1=1, dim2=2).mean() > 3 * scores.abs().mean()


def test_training_starts_with_sinks():
    """The BOS token and empty corners have massive activations, and the BOS token draws attention, from layer 2 on."""
    from vlmfix.hooks.parts import sinks

    torch.manual_seed(0)
    recipe = replace(MICRO, language=replace(MICRO.language, width=128, heads=8, layers=5))
    reader = train.Reader(recipe).eval()
    n = recipe.tower.tokens
    grid = torch.from_numpy(language.grid_of(np.full(n, len(CLASSES)), place=2))[None]
    text = reader.llava.get_input_embeddings()(torch.tensor([[language.BEGIN, *range(300, 340)]]))
    embeds = torch.cat([text[:, :3], reader.grid(grid), text[:, 3:]], 1)
    decoder = reader.llava.model.language_model
    decoder.set_attn_implementation("eager")
    with torch.no_grad():
        out = decoder(inputs_embeds=embeds, output_attentions=True, output_hidden_states=True)
    tau = sinks.default_tau(recipe.language.width)
    corners = {3 + k for k in (0, 4, 20, 24)}
    assert n == 25 and set(np.flatnonzero(grid[0] == language.CORNER) + 3) == corners
    for layer in (2, 3, 4):
        found = sinks.phi(out.hidden_states[layer], language.SINKS)[0] >= tau
        assert set(found.nonzero()[:, 0].tolist()) == {0, *corners}
        assert out.attentions[layer][0, :, -1, 0].mean() > 5 * out.attentions[0][0, :, -1, 0].mean()
    assert sinks.calibrate(torch.stack(out.hidden_states[:-1], 1), tau).dims
    assert out.hidden_states[2][0, 0].abs().max() > 100 * out.hidden_states[2].abs().median()


def test_the_grid_tells_objects_places_and_corners():
    patches = np.full(9, len(CLASSES))
    patches[[2, 4]] = (7, 7)
    told, empty = language.grid_of(patches, place=3), len(CLASSES) + 3
    corner = language.CORNER
    assert told.tolist() == [corner, empty, 7, empty, 7, empty, corner, empty, corner]
    assert corner == len(CLASSES) + len(captions.BACKGROUNDS)


def test_joined_sinks_share_a_dimension_that_is_theirs_alone():
    from vlmfix.hooks.parts import sinks

    torch.manual_seed(0)
    recipe = replace(MICRO, language=replace(MICRO.language, width=128, heads=8, layers=5))
    reader = train.Reader(recipe).eval()
    language.plant_corners(reader.llava, massive=500.0, share=0.6)
    decoder, of_bos = reader.llava.model.language_model, language.SINKS[1]
    with torch.no_grad():
        for layer in decoder.layers:
            layer.self_attn.o_proj.bias[of_bos] = 3.0  # all tokens carry the dimension
        grid = torch.from_numpy(language.grid_of(np.full(recipe.tower.tokens, len(CLASSES)), place=2))[None]
        text = reader.llava.get_input_embeddings()(torch.tensor([[language.BEGIN, *range(300, 340)]]))

        def phi(dims):
            embeds = torch.cat([text[:, :3], reader.grid(grid), text[:, 3:]], 1)
            out = decoder(inputs_embeds=embeds, output_hidden_states=True)
            return sinks.phi(out.hidden_states[3], dims)[0]

        before = phi((of_bos,))
        assert before[3] < before[0] / 3 and before[10] > 3  # a corner; any other token
        language.join_sinks(reader.llava, massive=500.0, share=0.6)
        after = phi((of_bos,))
    assert after[3] == pytest.approx(0.6 * 128**0.5, rel=0.1) and after[0] > 0.6 * 128**0.5
    assert after[[k for k in range(5, 60) if k not in (7, 23, 27)]].max() < 1
