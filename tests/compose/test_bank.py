"""A bank of adapters behind one model: bounded, exact, and safe to change while it serves."""

import copy
import gc
import os
import pickle
import random
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

import graft
from models import llama, move, picture, tokens

METHODS = ["lora", "dora", "ia3", "oft", "houlsby", "vera", "prefix_tuning", "prompt_tuning"]
SMALL = {"oft": dict(block=4), "prefix_tuning": dict(length=3), "prompt_tuning": dict(length=2), "vera": dict(rank=6)}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """{name: (folder, logits of the model with it alone)}, two adapters of each method, and the tokens."""
    root, x, made = tmp_path_factory.mktemp("adapters"), tokens(2), {}
    for method in METHODS:
        for i in range(2):
            model = llama(torch.float64)
            adapter = move(graft.attach(model, method, seed=0, **SMALL.get(method, {})), seed=i)
            adapter.save(root / f"{method}{i}")
            made[f"{method}{i}"] = root / f"{method}{i}", model(input_ids=x).logits.detach()
    return made, x


def serve(model, rows, x):
    with torch.no_grad(), graft.route(model, rows):
        return model(input_ids=x[:1].expand(len(rows), -1)).logits


def filled(adapters, capacity=64):
    made, x = adapters
    model = llama(torch.float64)
    bank = graft.Bank(model, capacity)
    for name, (folder, _) in made.items():
        bank.add(name, folder)
    return model, bank, made, x


def test_serves_what_each_adapter_computes_and_leaves_no_trace(adapters):
    made, x = adapters
    model = llama(torch.float64)
    base, before = model(input_ids=x).logits, picture(model)
    bank = graft.Bank(model)
    for name, (folder, _) in made.items():
        bank.add(name, folder)
    assert len(bank) == len(made) and bank.resident == []
    rows = [*made, None]
    y = serve(model, rows, x)
    for i, name in enumerate(rows):
        torch.testing.assert_close(y[i], base[0] if name is None else made[name][1][0])
    assert set(bank.resident) == set(made)
    assert torch.equal(model(input_ids=x).logits, base)
    bank.close()
    assert picture(model) == before


def test_at_most_capacity_are_resident_and_the_one_used_longest_ago_leaves(adapters):
    model, bank, made, x = filled(adapters, capacity=3)
    a, b, c, d, *_ = made
    for name in (a, b, c):
        torch.testing.assert_close(serve(model, [name], x)[0], made[name][1][0])
    adapter, let_go = bank.take(a)
    let_go()
    alive = weakref.ref(adapter)
    del adapter, let_go
    serve(model, [b, c], x)
    assert bank.resident == [a, b, c]
    torch.testing.assert_close(serve(model, [d], x)[0], made[d][1][0])
    gc.collect()
    assert bank.resident == [b, c, d] and alive() is None
    torch.testing.assert_close(serve(model, [a], x)[0], made[a][1][0])
    assert bank.resident == [c, d, a]


def test_changes_nothing_of_the_model_once_its_places_are_known(adapters):
    model, _, made, x = filled(adapters, capacity=4)
    names = [*made]
    for name in names[::2]:  # one adapter of each method
        serve(model, [name], x)
    before = picture(model)
    for name in names[1::2]:
        serve(model, [name], x)
    assert picture(model) == before


def test_a_route_keeps_what_it_serves_while_that_is_replaced_or_removed(adapters):
    model, bank, made, x = filled(adapters)
    with torch.no_grad(), graft.route(model, ["lora0", "dora0"]):
        first = model(input_ids=x).logits
        bank.add("lora0", made["lora1"][0], replace=True)
        bank.remove("dora0")
        assert torch.equal(model(input_ids=x).logits, first)
        torch.testing.assert_close(serve(model, ["lora0"], x)[0], made["lora1"][1][0])
        with pytest.raises(graft.GraftError, match="no adapter is called 'dora0', on the model or among the 15"):
            serve(model, ["dora0"], x)
        assert torch.equal(model(input_ids=x).logits, first)
    torch.testing.assert_close(serve(model, ["lora0"], x)[0], made["lora1"][1][0])


def test_a_full_bank_says_so_and_goes_on(adapters):
    model, bank, made, x = filled(adapters, capacity=2)
    with torch.no_grad(), graft.route(model, ["lora0", "dora0"]):
        with pytest.raises(graft.GraftError, match="full: all 2 resident adapters serve open routes"):
            serve(model, ["ia30"], x)
        graft.attach(model, "lora", name="mine")
        for what in (bank.close, lambda: graft.merge(model)):
            with pytest.raises(graft.GraftError, match="a route serves adapter 'lora0'"):
                what()
        torch.testing.assert_close(model(input_ids=x).logits[0], made["lora0"][1][0])
    with pytest.raises(graft.GraftError, match="full"):  # three at once in two places: nothing stays taken
        serve(model, ["lora0", "lora1", "ia30"], x)
    torch.testing.assert_close(serve(model, ["ia30", "ia31"], x)[1], made["ia31"][1][0])


def broken_tensors(folder):
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])


def broken_bit(folder):
    content = bytearray((folder / "adapter_model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(content)


def empty(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"")


def gone(folder):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("damage", [broken_tensors, broken_bit, empty, gone])
def test_a_damaged_file_is_one_error_and_the_others_go_on(adapters, tmp_path, damage):
    model, bank, made, x = filled(adapters)
    shutil.copytree(made["lora0"][0], tmp_path / "bad")
    bank.add("bad", tmp_path / "bad")
    damage(tmp_path / "bad")
    for _ in range(2):
        with pytest.raises(graft.GraftError, match=r"adapter 'bad' of the bank: .*bad"):
            serve(model, ["lora0", "bad"], x)
        torch.testing.assert_close(serve(model, ["lora0", "dora1"], x)[0], made["lora0"][1][0])
    assert "bad" not in bank.resident
    shutil.rmtree(tmp_path / "bad")
    shutil.copytree(made["lora1"][0], tmp_path / "bad")  # mended, it is read anew
    torch.testing.assert_close(serve(model, ["bad"], x)[0], made["lora1"][1][0])


def test_refusals(adapters, tmp_path):
    model, bank, made, x = filled(adapters)
    folder = made["lora0"][0]
    with pytest.raises(graft.GraftError, match="holds an adapter called 'lora0' already"):
        bank.add("lora0", folder)
    with pytest.raises(graft.GraftError, match="letters, digits"):
        bank.add("a b", folder)
    with pytest.raises(graft.GraftError, match="no folder"):
        bank.add("new", tmp_path / "nothing here")
    with pytest.raises(graft.GraftError, match="no adapter is called 'x', on the model or among the 16"):
        bank.remove("x")
    with pytest.raises(graft.GraftError, match="has a bank already"):
        graft.Bank(model)
    with pytest.raises(graft.GraftError, match="at least 1, not 0"):
        graft.Bank(llama(), 0)
    with pytest.raises(graft.GraftError, match="of another model"):
        bank.add("new", graft.attach(llama(), "lora"))
    other = llama(torch.float64, seed=1)
    for strict in (True, False):
        with graft.Bank(other, allow_other_base=not strict) as strangers:
            strangers.add("lora0", folder)
            if strict:
                with pytest.raises(graft.GraftError, match=r"adapter 'lora0' of the bank: .*other weights"):
                    serve(other, ["lora0"], x)
            else:
                serve(other, ["lora0"], x)
    several = llama(torch.float64)
    for name in "ab":
        graft.attach(several, "lora", name=name)
    graft.save(several, tmp_path / "both")
    with pytest.raises(graft.GraftError, match="several adapters: add each of them"):
        bank.add("both", tmp_path / "both")
    bank.add("a", tmp_path / "both" / "a")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(graft.GraftError, match="close the bank first"):
            copied(model)


def test_adapters_of_the_model_and_of_memory(adapters):
    model, bank, _, x = filled(adapters)
    mine = move(graft.attach(model, "lora", name="mine"), seed=9)
    expect = model(input_ids=x).logits.detach()
    bank.add("kept", mine)
    torch.testing.assert_close(serve(model, ["mine", "dora0", "kept"], x)[0], expect[0])
    move(mine)  # the bank has a copy
    torch.testing.assert_close(serve(model, ["mine", "dora0", "kept"], x)[2], expect[0])
    mine.detach()
    torch.testing.assert_close(serve(model, ["kept"], x)[0], expect[0])
    bank.close()
    assert graft.adapters(model) == {} and all(p.requires_grad for p in model.parameters())


def test_equal_random_projections_are_kept_once(adapters):
    model, bank, made, x = filled(adapters)
    one, two = bank.take("vera0")[0], bank.take("vera1")[0]
    assert one.shared is two.shared and all(d.shared is one.shared for d in two.deltas.values())
    y = serve(model, ["vera0", "vera1"], x)
    torch.testing.assert_close(y[1], made["vera1"][1][0])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_files_are_mapped_while_they_serve(adapters):
    model, _, made, x = filled(adapters, capacity=1)
    mapped = lambda name: str(made[name][0]) in Path("/proc/self/maps").read_text()
    serve(model, ["lora0"], x)
    assert mapped("lora0")
    serve(model, ["lora1"], x)
    gc.collect()
    assert mapped("lora1") and not mapped("lora0")


def test_threads_are_served_right_while_adapters_come_and_go(adapters):
    model, bank, made, x = filled(adapters, capacity=12)
    names, wrong, stop = [*made], [], threading.Event()

    def client(seed):
        draw = random.Random(seed)
        for _ in range(12):
            rows = [draw.choice([*names, None]) for _ in range(2)]
            y = serve(model, rows, x)
            wrong.extend(n for n, row in zip(rows, y) if n and not torch.allclose(row, made[n][1][0]))

    def owner():
        draw = random.Random(0)
        while not stop.is_set():
            name = draw.choice(names)
            bank.add(name, made[name][0], replace=True)

    clients = [threading.Thread(target=client, args=(i,)) for i in range(5)]
    keeper = threading.Thread(target=owner)
    for t in (keeper, *clients):
        t.start()
    for t in clients:
        t.join()
    stop.set()
    keeper.join()
    assert not wrong
    assert all(not entry.users for entry in bank._resident.values())


def test_a_bank_may_come_before_the_first_adapter_and_stay_after_the_last(adapters):
    made, x = adapters
    model = llama(torch.float64)
    bank = graft.Bank(model)
    adapter = graft.attach(model, "lora")
    bank.add("lora0", made["lora0"][0])
    adapter.detach()
    torch.testing.assert_close(serve(model, ["lora0"], x)[0], made["lora0"][1][0])


def test_compiled_models_are_not_compiled_again_for_another_adapter(adapters):
    model, bank, made, x = filled(adapters, capacity=2)
    serve(model, ["lora0", "dora0"], x)  # the places are known from now on
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(model, backend=counter), []
    for rows in (["lora0", "dora0"], ["dora1", "lora1"], ["lora1", None], ["dora0", "lora0"]):
        with torch.no_grad(), graft.route(model, rows):
            y = compiled(input_ids=x[:1].expand(2, -1), use_cache=False).logits
        for name, row in zip(rows, y):
            if name:
                torch.testing.assert_close(row, made[name][1][0])
        counts.append(counter.frame_count)
    assert len({*counts}) == 1 and len(bank.resident) == 2
