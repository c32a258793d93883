"""What the table of graphics cards says of a device."""
import os

import pytest
import torch

from model import GPT, GPTConfig
from onecard import cards
from onecard.cards import CARDS, machine_named
from onecard.runtime import World
from onecard.settings import UserError


@pytest.mark.parametrize("name", ["RTX 4070", "4070", "NVIDIA GeForce RTX 4070"])
def test_a_card_is_found_by_any_of_its_names(name):
    machine = machine_named(name, torch.bfloat16)
    assert machine.peak_flops == 58.3e12 and 10.7 < machine.room / 2**30 < 11.2
    assert machine_named(name, torch.float32).peak_flops is None


def test_an_unknown_card_names_its_neighbours():
    with pytest.raises(UserError, match="'RTX 4071' is not in the table of cards; nearest: rtx 4"):
        machine_named("RTX 4071", torch.bfloat16)


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2), ("Tesla T4", 65.0),
    ("NVIDIA GeForce RTX 4080 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None)])
def test_a_device_has_the_peak_of_its_own_card_or_none(name, tflops):
    card = cards.find(name)
    assert (card and card.tflops) == tflops


@pytest.mark.parametrize("name, sms, mhz", [
    ("rtx 3060", 28, 1777), ("rtx 3090", 82, 1695), ("rtx 4070", 46, 2475),
    ("rtx 4090", 128, 2520), ("rtx 5070", 48, 2512), ("rtx 5090", 170, 2407)])
def test_the_rates_of_the_cards_are_512_flop_for_each_sm_and_clock(name, sms, mhz):
    assert CARDS[name].tflops == pytest.approx(sms * mhz * 512 / 1e6, rel=0.01)


# tokens a second in public logs of compiled models without attention masks (dev/cards.md)
@pytest.mark.parametrize("name, n_layer, n_head, n_embd, tokens, rate", [
    ("rtx 4070", 12, 12, 384, 16384, 136_580), ("rtx 4070", 12, 12, 768, 8192, 56_100),
    ("rtx 4090", 12, 12, 768, 12288, 106_000), ("rtx 4090", 12, 12, 768, 12288, 126_000),
    ("rtx 3090 ti", 12, 12, 768, 12288, 69_200)])
def test_what_the_logs_show_lies_in_the_range(name, n_layer, n_head, n_embd, tokens, rate):
    with torch.device("meta"):
        network = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False))
    share = rate * network.flops_per_token() / CARDS[name].tflops / 1e12
    lowest, highest, source = cards.usual_share(CARDS[name], n_embd, tokens)
    assert lowest < share < highest and "by logs of this card at" in source


def test_a_range_is_wider_where_less_is_known():
    def width(name, n_embd=768, tokens=16384):
        lowest, highest, source = cards.usual_share(CARDS[name], n_embd, tokens)
        return highest / lowest, source

    of_its_own, of_a_like_one, of_none = width("rtx 4070"), width("rtx 4060"), width("h200")
    assert of_its_own[0] < of_a_like_one[0] < of_none[0]
    assert [source for _, source in (of_its_own, of_a_like_one, of_none)] == [
        "by logs of this card at 384 and 768 wide", "by logs of cards with as many bytes a FLOP",
        "a wide guess: there are no logs of such cards"]
    # a narrow model is as uncertain on a card without logs
    assert width("rtx 3080", n_embd=384) > width("rtx 3080", n_embd=768)
    # an RTX 5090 moves as many bytes a FLOP as a 4070, and 1.4 times as many as a 4090 (56 %)
    assert cards.usual_share(CARDS["rtx 5090"], 768, 16384)[0] > 0.6 * 0.7
    assert width("rtx 4070", n_embd=128) > width("rtx 4070") < width("rtx 4070", tokens=2048)


def test_this_machine_has_room_and_no_more_than_its_memory():
    machine = cards.machine_of(World(torch.device("cpu")))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.kind == "cpu" and 0 < machine.room <= total and machine.peak_flops is None
