/**
 * Owns the key in the subjects of work items, `lamina.v1.work.<key>.<id>`.
 *
 * Why so. nats-server answers on any subject that a caller names as its reply, and a stream stores what comes on a subject of
 * its. A client that knew where a request's work item goes could have such an answer stored there: a prompt of that id would
 * be taken for known, and answers would count as work that waits.
 *
 * Invariants
 * 1. The key is 120 random bits of whoever made LAMINA_WORK. It stands in the stream's configuration and nowhere else, which
 *    only services and the operator may read.
 * 2. A stream that has a key keeps it. A stream without one, of an older Lamina, gets one; what it has stays in it.
 */
import { randomBytes } from 'node:crypto';
import { STREAMS, SUBJECTS } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import type { StreamConfig } from 'nats';
import type { Bus } from './bus.ts';
import { streamManager } from './stream-manager.ts';

const KEY_BYTES = 15;
const KEY = /^[\w-]{20}$/;

function keyOf(subject: string | undefined): string | undefined {
  const key = subject?.split('.').at(-2);
  return key !== undefined && KEY.test(key) && subject === SUBJECTS.work(key, '*') ? key : undefined;
}

/** What LAMINA_WORK listens to, given what it listened to so far. */
export function workSubjects(existing: StreamConfig['subjects'] = []): string[] {
  const key = existing.map(keyOf).find((each) => each !== undefined) ?? randomBytes(KEY_BYTES).toString('base64url');
  return [SUBJECTS.work(key, '*')];
}

/** @throws LaminaError `unavailable` when the stream has none; others when it cannot be read. */
export async function readWorkKey(bus: Bus): Promise<string> {
  const { config } = await (await streamManager(bus)).streams.info(STREAMS.work.name);
  const key = keyOf(config.subjects[0]);
  if (key !== undefined) return key;
  const advice = 'a service of an older Lamina has made it; restart any service of this one';
  throw new LaminaError('unavailable', `the subjects of ${STREAMS.work.name} have no key: ${advice}`);
}

/** The request of a work item; undefined where the subject is none of ours. */
export function requestIdOfWork(subject: string): string | undefined {
  const requestId = subject.slice(subject.lastIndexOf('.') + 1);
  const key = keyOf(`${subject.slice(0, -requestId.length)}*`);
  return key === undefined ? undefined : requestId;
}
