"""What the tests of the loaders share."""

import weakref

import pytest


@pytest.fixture
def watch_reads(monkeypatch):
    """watch_reads(module): names of the tensors that its `open_weights` reads from now on, in order.

    Fails where a tensor that was read is still in memory when the one after the next is asked for.
    """

    def watch(module):
        read, alive, real = [], [], module.open_weights

        def watched(source):
            found = real(source)

            def one(name, stored):
                def take():
                    # The tensor of before may still be in the caller's hand, those before it not.
                    assert sum(each() is not None for each in alive) <= 1, "what was read is still in memory"
                    tensor = stored.read()
                    read.append(name)
                    alive.append(weakref.ref(tensor))
                    return tensor

                return stored._replace(read=take)

            return found._replace(tensors={name: one(name, t) for name, t in found.tensors.items()})

        monkeypatch.setattr(module, "open_weights", watched)
        return read

    return watch
