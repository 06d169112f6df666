/**
 * Owns what one client has received of one answer, stitched together over its connections.
 *
 * Invariants
 * 1. Within a connection each token comes once and in order, from where the connection begins: at the first token of the
 *    answer, or behind the last that the client has. What is before the one that is due is doubled.
 * 2. A token that comes again on a later connection that begins at the first is the same.
 * 3. Nothing behind a gap is taken.
 */
export interface AnswerToken {
  /** Undefined where only the text is told. */
  readonly token?: number | undefined;
  readonly text: string;
}

export class Received {
  readonly tokens: AnswerToken[] = [];
  /** Of the end, when it has come. */
  finishReason: string | undefined;
  numConnections = 0;
  /** Connections behind one that broke after it had given tokens. */
  numResumed = 0;
  numDoubled = 0;
  /** What may not happen; the client gives up then. */
  readonly mistakes: string[] = [];
  #firstIndex = 0;
  #dueIndex = 0;

  /** Of the first token that the client does not have. */
  get nextIndex(): number {
    return this.tokens.length;
  }

  get isOver(): boolean {
    return this.finishReason !== undefined || this.mistakes.length > 0;
  }

  /** A connection begins, whose first token has this index. */
  connect(firstIndex: number): void {
    this.numConnections++;
    if (this.#dueIndex > this.#firstIndex) this.numResumed++;
    this.#firstIndex = firstIndex;
    this.#dueIndex = firstIndex;
  }

  /**
   * @param token Undefined for an end without a token.
   * @returns Whether it could be taken: false behind a gap.
   */
  take(index: number, token: AnswerToken | undefined, finishReason: string | null): boolean {
    if (index > this.#dueIndex) return false;
    if (index < this.#dueIndex) {
      this.numDoubled++;
      return true;
    }
    if (token !== undefined) {
      this.#dueIndex++;
      const known = this.tokens[index];
      if (known === undefined) this.tokens.push(token);
      else if (!isSame(known, token))
        this.mistakes.push(`token ${index} was ${JSON.stringify(known)} and came again as ${JSON.stringify(token)}`);
    }
    if (finishReason !== null) this.finishReason = finishReason;
    return true;
  }
}

/** Whether these are the same token, as far as is told of both. */
export function isSame(one: AnswerToken, other: AnswerToken): boolean {
  const isOneUnknown = one.token === undefined || other.token === undefined;
  return one.text === other.text && (isOneUnknown || one.token === other.token);
}
