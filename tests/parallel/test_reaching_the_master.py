"""The interface to the master, and waiting for it."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from dft import interface
from dft.distributed import free_port
from dft.errors import UserError
from dft.interface import find_interface, interface_of, local_address, set_gloo_interface
from dft.parallel import master
from dft.parallel.master import wait_for_master
from tests.helpers import run

SEVERAL_NODES = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "worker-0"}


@pytest.fixture
def two_networks(monkeypatch):
    """A machine with two interfaces; worker-0 is on the second, and localhost is what the master calls itself."""
    routes = {"worker-0": "10.1.0.5", "localhost": "127.0.0.1", interface.SOMEWHERE_ELSE: "10.0.0.5"}
    monkeypatch.setattr(interface, "local_address", routes.get)
    monkeypatch.setattr(interface, "interface_of", {"10.0.0.5": "eth0", "10.1.0.5": "ib0", "127.0.0.1": "lo"}.get)


def test_the_interface_is_that_of_the_route_to_the_master(two_networks):
    assert find_interface("worker-0") == "ib0"
    assert find_interface("localhost") == "eth0"  # other nodes can't reach the loopback
    assert find_interface("unknown") == "eth0"


def test_the_loopback_is_never_taken(monkeypatch):
    monkeypatch.setattr(interface, "local_address", lambda host: "127.0.0.1")
    assert find_interface("localhost") is None


def test_addresses_belong_to_interfaces():
    assert interface_of("127.0.0.1") == "lo"
    assert local_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("198.51.100.7") is None
    assert local_address("no-such-host.invalid") is None


def test_an_ipv6_address_belongs_to_an_interface(monkeypatch):
    addresses = {"lo": ["::1"], "eth7": ["fe80::1%eth7", "fd00::2"]}
    found = {
        name: [SimpleNamespace(family=socket.AF_INET6, address=a) for a in own] for name, own in addresses.items()
    }
    monkeypatch.setattr(interface.psutil, "net_if_addrs", lambda: found)
    assert interface_of("fd00::2") == "eth7"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "ib0"),
        ({"GLOO_SOCKET_IFNAME": "mine"}, "mine"),
        ({"LOCAL_WORLD_SIZE": "2"}, "lo"),  # one node
        ({"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": ""}, None),  # no launcher
        ({"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "1"}, "ib0"),  # as DeepSpeed's launcher says it
    ],
)
def test_it_is_set_unless_the_user_has_set_it(monkeypatch, two_networks, env, expected):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in (SEVERAL_NODES | env).items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    set_gloo_interface()
    assert interface.os.environ.get("GLOO_SOCKET_IFNAME") == expected


# ---- waiting for the master ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(master, "PAUSE_SECONDS", 0.05)


def test_a_master_that_starts_later_is_waited_for(capsys):
    port = int(free_port())

    def start_late():
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.accept()

    thread = threading.Thread(target=start_late)
    thread.start()
    wait_for_master("127.0.0.1", port, not_started=30)
    thread.join()
    assert "Waiting up to 30 s for the master 127.0.0.1" in capsys.readouterr().out


def test_a_master_that_never_starts_is_told_from_one_that_cannot_be_reached():
    with pytest.raises(UserError, match="has not started after 0 s: the host is there"):
        wait_for_master("127.0.0.1", int(free_port()), not_started=0.2, unreachable=99)
    with pytest.raises(UserError, match="MASTER_ADDR=no-such-host.invalid .* can't be reached after 0 s"):
        wait_for_master("no-such-host.invalid", 29500, not_started=99, unreachable=0.2)


def test_an_unreachable_master_ends_before_two_minutes():
    assert master.UNREACHABLE_SECONDS + master.ATTEMPT_SECONDS + 10 < 120


def test_the_launch_script_needs_the_address_of_the_master(tmp_path):
    result = run(["bash", "scripts/train.sh"], LAUNCHER="torchrun", NNODES=2, NODE_RANK=1, LOG_DIR=tmp_path)
    assert result.returncode == 2
    assert "NODE_RANK=1 of several nodes without MASTER_ADDR" in result.stdout
