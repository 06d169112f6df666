/**
 * Owns which relays are open: all, those of a request, and how many each client has.
 *
 * Invariants
 * 1. What a client costs is counted up and down under the same key; a relay of nobody is in no client's count.
 * 2. Finding those of a request reads no other: a cancel is one message, and anybody may send many.
 */

export class OpenRelays<Relay extends { readonly id: string }> {
  readonly #clients = new Map<Relay, string | undefined>();
  readonly #ofId = new Map<string, Set<Relay>>();
  readonly #numOfClient = new Map<string, number>();

  get size(): number {
    return this.#clients.size;
  }

  numOf(client: string): number {
    return this.#numOfClient.get(client) ?? 0;
  }

  /** @param client Undefined for one that the gateway opened for itself: no client can have that name. */
  add(relay: Relay, client: string | undefined): void {
    this.#clients.set(relay, client);
    const others = this.#ofId.get(relay.id);
    if (others === undefined) this.#ofId.set(relay.id, new Set([relay]));
    else others.add(relay);
    if (client !== undefined) this.#numOfClient.set(client, this.numOf(client) + 1);
  }

  /** Whether it was open. */
  delete(relay: Relay): boolean {
    const client = this.#clients.get(relay);
    if (!this.#clients.delete(relay)) return false;
    const same = this.#ofId.get(relay.id);
    same?.delete(relay);
    if (same?.size === 0) this.#ofId.delete(relay.id);
    if (client === undefined) return true;
    const rest = this.numOf(client) - 1;
    if (rest === 0) this.#numOfClient.delete(client);
    else this.#numOfClient.set(client, rest);
    return true;
  }

  has(id: string): boolean {
    return this.#ofId.has(id);
  }

  /** Those of a request, as of now. */
  of(id: string): readonly Relay[] {
    return [...(this.#ofId.get(id) ?? [])];
  }

  /** All, as of now. */
  all(): readonly Relay[] {
    return [...this.#clients.keys()];
  }
}
