/**
 * Owns finding the least of many items whose keys change: a binary heap in which each item knows its place.
 *
 * Invariants
 * 1. Adding, removing and moving one takes time in the logarithm of how many there are; to see the least takes none.
 * 2. An item is in one heap at most, once.
 */
export interface Placed {
  /** Position in the heap; -1 outside. Written by the heap alone. */
  place: number;
}

export class LeastFirst<T extends Placed> {
  readonly #isBefore: (one: T, other: T) => boolean;
  readonly #items: T[] = [];

  /** @param isBefore A strict order. Call `moved` for an item when what it says of that has changed. */
  constructor(isBefore: (one: T, other: T) => boolean) {
    this.#isBefore = isBefore;
  }

  get least(): T | undefined {
    return this.#items[0];
  }

  add(item: T): void {
    this.#put(item, this.#items.length);
    this.#rise(item);
  }

  remove(item: T): void {
    const { place } = item;
    const last = this.#items.pop();
    item.place = -1;
    if (last === undefined || last === item) return;
    this.#put(last, place);
    this.moved(last);
  }

  moved(item: T): void {
    this.#rise(item);
    this.#sink(item);
  }

  #put(item: T, place: number): void {
    this.#items[place] = item;
    item.place = place;
  }

  #rise(item: T): void {
    while (item.place > 0) {
      const at = item.place;
      const above = this.#items[(at - 1) >> 1]!;
      if (!this.#isBefore(item, above)) return;
      this.#put(item, above.place);
      this.#put(above, at);
    }
  }

  #sink(item: T): void {
    for (;;) {
      const at = item.place;
      const left = this.#items[2 * at + 1];
      const right = this.#items[2 * at + 2];
      const below = left !== undefined && right !== undefined && this.#isBefore(right, left) ? right : left;
      if (below === undefined || !this.#isBefore(below, item)) return;
      this.#put(item, below.place);
      this.#put(below, at);
    }
  }
}
