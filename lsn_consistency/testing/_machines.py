"""
Machines and networks for the servers of a container cluster, over testcontainers and Docker.

A machine is a container that sleeps. PostgreSQL and its programs are run in it, so it is there
when the server is not, its disk outlives a kill, and its networks can be unplugged one by one.

Everything that the Docker client raises leaves this module as `ClusterError`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import shlex
import tarfile
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from lsn_consistency.testing._errors import ClusterError, ContainersUnavailableError
from lsn_consistency.testing._workspace import PROGRAM_SECONDS, wait_until

if TYPE_CHECKING:
    from testcontainers.core.docker_client import DockerClient

__all__ = ["Machine", "Network", "Program", "open_engine"]

ENGINE_SECONDS = 60
"""How long the Docker engine may take to answer one request."""

LIFE_SECONDS = 6 * 3600
"""A machine whose test process was killed ends by itself after this time."""

NETWORK_TRIALS = 5
FIRST_HOST = 10
ACCOUNT = "postgres"

HOME = "/var/tmp/lsn-consistency"
"""A folder inside each container, where its server lives; nothing of this machine."""

# Towards a network that was unplugged the kernel would try for two minutes to connect.
_SYSCTLS = {"net.ipv4.tcp_syn_retries": "1"}

_HINT = (
    "it needs a Docker engine (DOCKER_HOST), an image with PostgreSQL 14 or newer and "
    "pip install 'lsn-consistency[containers]'"
)
_RYUK_HINT = (
    "testcontainers clears up with it when a test process is killed; "
    "TESTCONTAINERS_RYUK_DISABLED=true does without"
)


@contextlib.contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    """Turn what the Docker client raises into `ClusterError`."""
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        yield
    except (DockerException, RequestException) as error:
        raise ClusterError(f"{what}: {error}") from error


def open_engine(image: str) -> DockerClient:
    """
    Return a client of a Docker engine that has an image, which is pulled if need be.

    Raises `ContainersUnavailableError` that says what is missing.
    """
    try:
        from docker.errors import DockerException
        from requests.exceptions import RequestException
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.docker_client import DockerClient
    except ImportError as error:
        raise ContainersUnavailableError(f"{error}: {_HINT}") from error
    try:
        engine = DockerClient(timeout=ENGINE_SECONDS)
    except (DockerException, RequestException) as error:
        raise ContainersUnavailableError(f"no Docker engine answers ({error}): {_HINT}") from error
    try:
        _have_image(engine, image, _HINT)
        if not testcontainers_config.ryuk_disabled:
            _have_image(engine, testcontainers_config.ryuk_image, _RYUK_HINT)
    except BaseException:
        engine.client.close()
        raise
    return engine


def _have_image(engine: DockerClient, image: str, hint: str) -> None:
    """Pull an image that the engine does not have yet."""
    from docker.errors import DockerException, ImageNotFound
    from requests.exceptions import RequestException

    try:
        try:
            engine.client.images.get(image)
        except ImageNotFound:
            engine.client.images.pull(image)
    except (DockerException, RequestException) as error:
        raise ContainersUnavailableError(f"there is no image {image} ({error}): {hint}") from error


class Network:
    """
    A network of a cluster, in which each machine keeps its address for good.

    It is there from `make()` to `remove()`. `purpose` is its name within the cluster. An internal
    network has no way out of it.
    """

    def __init__(self, engine: DockerClient, purpose: str, *, internal: bool) -> None:
        self.purpose = purpose
        self._engine = engine
        self._internal = internal
        self._name = f"lsn-consistency-{purpose}-{uuid4().hex[:12]}"
        self._network: Any = None

    @property
    def name(self) -> str:
        """
        The name under which the engine knows it.
        """
        return self._name

    def make(self) -> None:
        """
        Make the network, with a range of addresses that the engine found to be free.
        """
        from docker.errors import APIError
        from docker.types import IPAMConfig, IPAMPool

        for trial in range(NETWORK_TRIALS):
            # Addresses may be chosen in a range that was asked for, not in one that was given.
            with _engine_errors("no network could be made"):
                given = self._create()
                try:
                    given.reload()
                    pool = given.attrs["IPAM"]["Config"][0]
                finally:
                    given.remove()
                self._range = ipaddress.ip_network(pool["Subnet"])
                gateway = pool.get("Gateway", str(self._range[1])).partition("/")[0]
                asked = IPAMConfig(pool_configs=[IPAMPool(subnet=pool["Subnet"], gateway=gateway)])
                try:
                    self._network = self._create(ipam=asked)
                    return
                except APIError:
                    # Somebody else may have been given the same range meanwhile.
                    if trial == NETWORK_TRIALS - 1:
                        raise

    def _create(self, **options: Any) -> Any:
        """Have the engine create it; testcontainers puts its labels on it."""
        given = {"driver": "bridge", "internal": self._internal, **options}
        return self._engine.client_networks_create(self._name, given)

    def address(self, number: int) -> str:
        """
        Return the address of the machine with a number from 0 on.
        """
        return str(self._range[FIRST_HOST + number])

    def plug(self, container: Any, number: int) -> None:
        """
        Connect a machine under its address.
        """
        with _engine_errors(f"a machine could not be connected to {self.purpose}"):
            self._network.connect(container, ipv4_address=self.address(number))

    def unplug(self, container: Any) -> None:
        """
        Take a machine out of the network; nobody is told, packets just go nowhere.
        """
        with _engine_errors(f"a machine could not be disconnected from {self.purpose}"):
            self._network.disconnect(container, force=True)

    def remove(self) -> None:
        """
        Remove the network, once no machine is in it any more; nothing if it was not made.
        """
        from docker.errors import NotFound

        if self._network is not None:
            with _engine_errors("a network could not be removed"), contextlib.suppress(NotFound):
                self._network.remove()


class Machine:
    """
    A container with a number in each of its networks, in which programs are run.

    The first of the networks is the one that it has from the start.
    """

    def __init__(self, name: str, number: int, image: str, networks: Mapping[str, Network]) -> None:
        from docker.constants import DEFAULT_DOCKER_API_VERSION
        from docker.types import EndpointConfig
        from testcontainers.core.container import DockerContainer

        first = next(iter(networks.values()))
        endpoint = EndpointConfig(DEFAULT_DOCKER_API_VERSION, ipv4_address=first.address(number))
        self.name = name
        self.number = number
        self.networks = networks
        self.unplugged: set[str] = set()
        self._container = DockerContainer(image, docker_client_kw={"timeout": ENGINE_SECONDS})
        self._container.with_name(f"lsn-consistency-{name}-{uuid4().hex[:12]}")
        self._container.with_command(["sleep", str(LIFE_SECONDS)]).with_kwargs(
            entrypoint=[],
            user=ACCOUNT,
            hostname=name.replace("_", "-"),
            network=first.name,
            networking_config={first.name: endpoint},
            sysctls=_SYSCTLS,
        )

    # -- life -----------------------------------------------------------------------------------

    def boot(self) -> None:
        """
        Create the container and connect it to all of its networks.
        """
        with _engine_errors(f"the machine {self.name} could not be started"):
            self._container.start()
        for network in list(self.networks.values())[1:]:
            network.plug(self._docker, self.number)
        self.run("mkdir", "-p", HOME)

    @property
    def _docker(self) -> Any:
        """The container as the Docker client has it."""
        return self._container.get_wrapped_container()

    @property
    def _api(self) -> Any:
        """The calls of the engine that have no method on containers."""
        return self._docker.client.api

    @property
    def up(self) -> bool:
        """
        True while the machine is not killed; it may be paused.
        """
        with _engine_errors(f"{self.name} could not be asked for its state"):
            self._docker.reload()
            return bool(self._docker.attrs["State"]["Running"])

    def wake(self) -> bool:
        """
        Start a machine that was killed; return whether it was.

        Its disk is as it was, and so are its addresses.
        """
        if self.up:
            return False
        with _engine_errors(f"the machine {self.name} could not be started again"):
            self._docker.start()
        return True

    def kill(self) -> None:
        """
        End every process of the machine at once.
        """
        with _engine_errors(f"the machine {self.name} could not be killed"):
            # Of a paused one the engine lets the processes go on when the signal waits for them.
            self._docker.kill("SIGKILL")
            self._docker.wait(timeout=ENGINE_SECONDS)

    def pause(self) -> None:
        """
        Hold every process of the machine.
        """
        with _engine_errors(f"the machine {self.name} could not be paused"):
            self._docker.pause()

    def unpause(self) -> None:
        """
        Let every process of the machine go on.
        """
        with _engine_errors(f"the machine {self.name} could not be unpaused"):
            self._docker.unpause()

    def remove(self) -> None:
        """
        Remove the container with all that is in it.
        """
        with _engine_errors(f"the machine {self.name} could not be removed"):
            self._container.stop()

    # -- networks -------------------------------------------------------------------------------

    def address(self, purpose: str) -> str:
        """
        Return the address in one of the networks.
        """
        return self.networks[purpose].address(self.number)

    def unplug(self, purpose: str) -> None:
        """
        Take the machine out of a network; nothing if it is not in it.
        """
        if purpose not in self.unplugged:
            self.networks[purpose].unplug(self._docker)
            self.unplugged.add(purpose)

    def plug(self, purpose: str) -> None:
        """
        Put the machine back into a network, under its address; nothing if it is in it.
        """
        if purpose in self.unplugged:
            self.networks[purpose].plug(self._docker, self.number)
            self.unplugged.discard(purpose)

    # -- programs -------------------------------------------------------------------------------

    def run(self, *command: str) -> str:
        """
        Run a program to its end and return its output; `ClusterError` if it fails.
        """
        with _engine_errors(f"{command[0]} could not be run on {self.name}"):
            result = self._docker.exec_run(list(command), user=ACCOUNT)
        output = str(result.output.decode("utf-8", "replace"))
        if result.exit_code != 0:
            problem = f"{command[0]} failed on {self.name} with status {result.exit_code}"
            raise ClusterError(problem, output)
        return output

    def begin(self, log: str, *command: str) -> Program:
        """
        Start a program, its output appended to a log file of the machine.
        """
        line = f"exec {shlex.join(command)} >>{shlex.quote(log)} 2>&1"
        with _engine_errors(f"{command[0]} could not be run on {self.name}"):
            number = self._api.exec_create(self._docker.id, ["sh", "-c", line], user=ACCOUNT)["Id"]
            self._api.exec_start(number, detach=True)
        return Program(command[0], lambda: self._state(number))

    def _state(self, number: str) -> tuple[bool, int | None]:
        """Return whether a program runs, and its exit status after that."""
        from docker.errors import NotFound

        with _engine_errors(f"{self.name} could not be asked for a program"):
            try:
                found = self._api.exec_inspect(number)
            except NotFound:
                # Forgotten together with a life of the machine that has ended.
                return False, None
        return bool(found["Running"]), found["ExitCode"]

    def read(self, path: str) -> bytes | None:
        """
        Return the content of a file, also while the machine is down; None if there is no such.
        """
        from docker.errors import NotFound

        with _engine_errors(f"{path} could not be read on {self.name}"):
            try:
                chunks, _ = self._docker.get_archive(path)
            except NotFound:
                return None
            archive = BytesIO(b"".join(chunks))
        with tarfile.open(fileobj=archive) as files:
            content = files.extractfile(files.getmembers()[0])
            return content.read() if content is not None else b""


class Program:
    """
    A program that was started on a machine.
    """

    def __init__(self, name: str, state: Callable[[], tuple[bool, int | None]]) -> None:
        self.name = name
        self._state = state

    @property
    def running(self) -> bool:
        """
        True until it has ended, by itself or with its machine.
        """
        return self._state()[0]

    def finish(self) -> None:
        """
        Wait for its end; `ClusterError` if it fails or takes too long.
        """
        if not wait_until(lambda: not self.running, PROGRAM_SECONDS):
            raise ClusterError(f"{self.name} took more than {PROGRAM_SECONDS:g} s")
        _, status = self._state()
        if status != 0:
            raise ClusterError(f"{self.name} failed with status {status}")
