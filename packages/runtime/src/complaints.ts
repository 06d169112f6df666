/**
 * Owns telling of what others have caused: messages and HTTP requests that were malformed, or whose handler failed.
 *
 * Invariants
 * 1. Every one is counted, by code.
 * 2. At most `MAX_PER_WINDOW` of a window of `WINDOW_MS` are logged, then how many were not: whoever sends nonsense fills no disk,
 *    and keeps nobody busy with writing about it.
 */
import { asLaminaError } from '@lamina/tensor';
import { Counter, type Registry } from './metrics.ts';

export const MAX_PER_WINDOW = 20;
export const WINDOW_MS = 1_000;

/** `subject`: of the message, or the route of the HTTP request, where it had one. */
export type Complain = (cause: unknown, subject?: string) => void;

/** What it needs of a `Logger`. */
export interface ErrorLog {
  error(fields: object, text: string): void;
}

export function createComplaints(log: ErrorLog, registry: Registry): Complain {
  const counter = new Counter({
    name: 'lamina_bus_errors_total',
    help: 'Messages that were malformed or whose handler failed',
    labelNames: ['code'],
    registers: [registry],
  });
  let numInWindow = 0;
  const endWindow = (): void => {
    const numUnlogged = numInWindow - MAX_PER_WINDOW;
    if (numUnlogged > 0) log.error({ numUnlogged, windowMs: WINDOW_MS }, 'more messages failed');
    numInWindow = 0;
  };
  return (cause, subject) => {
    const err = asLaminaError(cause);
    counter.inc({ code: err.code });
    numInWindow++;
    if (numInWindow === 1) setTimeout(endWindow, WINDOW_MS).unref();
    if (numInWindow <= MAX_PER_WINDOW) log.error({ err, subject }, 'message failed');
  };
}
