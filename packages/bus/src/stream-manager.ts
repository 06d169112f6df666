/**
 * Owns how streams and consumers are asked about and made.
 *
 * Invariants
 * 1. A question is one round trip: whether there is JetStream at all is not asked before it, its answer says so.
 */
import type { JetStreamManager } from 'nats';
import type { Bus } from './bus.ts';

export function streamManager(bus: Bus): Promise<JetStreamManager> {
  return bus.connection.jetstreamManager({ checkAPI: false });
}
