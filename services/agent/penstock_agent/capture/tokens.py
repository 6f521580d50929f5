"""A tree of token sequences, in which nothing is stored twice.

Owns nodes and their order. Invariant: the tokens of a path are exactly those that were attached to it. Context nodes
are split if another path leaves them in the middle; sampled nodes never.
"""

from dataclasses import dataclass, field

from penstock.contracts.trajectories import Node, VersionSpan

INT32 = 4


@dataclass(eq=False)
class TokenNode:
    """Tokens below those of a parent; only the root, which no path shows, has none.

    auxiliary: sampled outside of the conversation. leads_on: a turn of the conversation was sampled somewhere below.
    """

    parent: "TokenNode | None"
    token_ids: bytes
    logprobs: bytes | None = None
    spans: tuple[VersionSpan, ...] = ()
    role: str = ""
    auxiliary: bool = False
    leads_on: bool = False
    children: "list[TokenNode]" = field(default_factory=list)

    @property
    def is_sampled(self) -> bool:
        return self.logprobs is not None


class TokenTree:
    """Paths of tokens from one root."""

    def __init__(self, train_auxiliary: bool = False) -> None:
        self._train_auxiliary = train_auxiliary
        self.root = TokenNode(None, b"")
        self._nodes: list[TokenNode] = []  # a parent before its children

    def path(self, node: TokenNode) -> bytes:
        """The tokens from the root to the end of a node."""
        parts = []
        step: TokenNode | None = node
        while step is not None:
            parts.append(step.token_ids)
            step = step.parent
        return b"".join(reversed(parts))

    def attach(self, below: TokenNode, token_ids: bytes, role: str) -> tuple[TokenNode, bool]:
        """Let context tokens follow a node, new only as far as the tree does not have them.

        Returns the node that ends them, and whether a turn that is sampled there opens one more path of the episode:
        the path that they share already leads on to another turn.
        """
        node, rest = below, token_ids
        while rest and (found := _shared(node, rest)):
            child, length = found
            node = child if length == len(child.token_ids) else self._split(child, length)
            rest = rest[length:]
        opens = _is_taken(node)
        return (self._append(TokenNode(node, rest, role=role)) if rest else node), opens

    def sample(self, node: TokenNode) -> None:
        """Append a sampled turn to its parent. It is no other's, even if the tokens are the same."""
        self._append(node)
        above = None if node.auxiliary else node.parent
        while above is not None and not above.leads_on:
            above.leads_on = True
            above = above.parent

    def nodes(self) -> tuple[Node, ...]:
        """As a message has them."""
        index = {id(node): position for position, node in enumerate(self._nodes)}
        index[id(self.root)] = -1
        return tuple(
            Node(
                index[id(node.parent)],
                node.token_ids,
                node.logprobs,
                node.spans,
                node.role,
                node.auxiliary and not self._train_auxiliary,
            )
            for node in self._nodes
        )

    def _append(self, node: TokenNode) -> TokenNode:
        assert node.parent is not None
        node.parent.children.append(node)
        self._nodes.append(node)
        return node

    def _split(self, node: TokenNode, length: int) -> TokenNode:
        """Cut a context node. The new node is its head, so that the old one still ends the path that it ended."""
        assert node.parent is not None
        head = TokenNode(node.parent, node.token_ids[:length], role=node.role, leads_on=node.leads_on, children=[node])
        node.parent.children[node.parent.children.index(node)] = head
        node.parent, node.token_ids = head, node.token_ids[length:]
        self._nodes.insert(self._nodes.index(node), head)
        return head


def _is_taken(node: TokenNode) -> bool:
    """Whether a turn behind the node opens one more path, instead of ending the one that the node is of."""
    step = node
    while step.parent is not None and not step.leads_on and (step.auxiliary or not step.is_sampled):
        step = step.parent  # only auxiliary turns are below
    return step.leads_on


def _shared(node: TokenNode, token_ids: bytes) -> tuple[TokenNode, int] | None:
    """The child that begins with most of the tokens, and how many bytes; a sampled one only if it is whole."""
    best: tuple[TokenNode, int] | None = None
    for child in node.children:
        length = _common_bytes(child.token_ids, token_ids)
        if child.is_sampled and (length < len(child.token_ids) or child.auxiliary):
            continue
        if length > (best[1] if best else 0):
            best = child, length
    return best


def _common_bytes(one: bytes, other: bytes) -> int:
    """The bytes of their common tokens."""
    low, high = 0, min(len(one), len(other)) // INT32
    while low < high:  # the comparison of slices is fast, so halve what is unknown
        middle = (low + high + 1) // 2
        if one[low * INT32 : middle * INT32] == other[low * INT32 : middle * INT32]:
            low = middle
        else:
            high = middle - 1
    return low * INT32
