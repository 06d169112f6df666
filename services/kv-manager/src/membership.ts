/**
 * Owns who is alive: members by id and when each was last heard.
 *
 * Invariants
 * 1. Silence counts only while this process listened: after it was stalled or cut off itself, everyone starts anew.
 * 2. Members keep the order in which they registered.
 */

interface Entry<Member> {
  readonly member: Member;
  heardAtMs: number;
}

export class Membership<Member> {
  readonly #timeoutMs: number;
  readonly #entries = new Map<string, Entry<Member>>();

  constructor(timeoutMs: number) {
    this.#timeoutMs = timeoutMs;
  }

  get size(): number {
    return this.#entries.size;
  }

  get(id: string): Member | undefined {
    return this.#entries.get(id)?.member;
  }

  *entries(): IterableIterator<[string, Member]> {
    for (const [id, { member }] of this.#entries) yield [id, member];
  }

  /** Adds a member, or notes that a known one was heard. */
  hear(id: string, nowMs: number, create: () => Member): Member {
    const known = this.#entries.get(id);
    if (known !== undefined) {
      known.heardAtMs = nowMs;
      return known.member;
    }
    const member = create();
    this.#entries.set(id, { member, heardAtMs: nowMs });
    return member;
  }

  remove(id: string): Member | undefined {
    const member = this.#entries.get(id)?.member;
    this.#entries.delete(id);
    return member;
  }

  clear(): void {
    this.#entries.clear();
  }

  /** Everyone counts as heard now. */
  forgive(nowMs: number): void {
    for (const entry of this.#entries.values()) entry.heardAtMs = nowMs;
  }

  /** Removes and returns who was silent for the time-out. */
  expire(nowMs: number): { id: string; member: Member }[] {
    const expired: { id: string; member: Member }[] = [];
    for (const [id, { member, heardAtMs }] of this.#entries) {
      if (nowMs - heardAtMs < this.#timeoutMs) continue;
      this.#entries.delete(id);
      expired.push({ id, member });
    }
    return expired;
  }
}
