/**
 * Owns the clients that have requests on this executor, and whose turn it is.
 *
 * Invariants
 * 1. Next is the client whose last turn is longest ago; one that has just come counts as if it had had one then. So a client
 *    waits for at most one turn of each other, whatever their requests and priorities are.
 * 2. Turns are counted, each number is given once: two clients are never equal.
 * 3. A client is forgotten with its last request, and comes again as a new one: it can only lose by that.
 */

interface Clock {
  turns: number;
}

export class Client {
  readonly #clock: Clock;
  /** Its last turn for KV. */
  kvTurn: number;
  /** Its last turn to be first in a step. */
  stepTurn: number;
  /** Its requests on this executor. */
  numRequests = 0;

  constructor(clock: Clock) {
    this.#clock = clock;
    this.kvTurn = ++clock.turns;
    this.stepTurn = this.kvTurn;
  }

  /** Later than all turns so far. */
  takeKvTurn(): number {
    this.kvTurn = ++this.#clock.turns;
    return this.kvTurn;
  }

  takeStepTurn(): void {
    this.stepTurn = ++this.#clock.turns;
  }
}

export class Clients {
  readonly #clock: Clock = { turns: 0 };
  /** By id; '' is the client of the requests that name none. */
  readonly #byId = new Map<string, Client>();

  get size(): number {
    return this.#byId.size;
  }

  /** The client of one more request. */
  enter(clientId = ''): Client {
    let client = this.#byId.get(clientId);
    if (client === undefined) {
      client = new Client(this.#clock);
      this.#byId.set(clientId, client);
    }
    client.numRequests++;
    return client;
  }

  /** One of its requests has gone. */
  leave(client: Client, clientId = ''): void {
    client.numRequests--;
    if (client.numRequests === 0) this.#byId.delete(clientId);
  }
}
