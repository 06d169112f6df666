/**
 * Owns the count of the waves of a worker that could go on.
 *
 * While there is none, all wait for shards, and the thread may as well wait in the socket: a message that is waited for there
 * costs no turn of the event loop.
 */
export class Turns {
  /** Waves with a step whose next thing is not an answer. */
  numRunnable = 0;
}
