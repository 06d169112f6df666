import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { GONE_AFTER_MS, UnheardReplies } from '../src/unheard-replies.ts';

let replies: UnheardReplies;
let gone: number;

beforeEach(() => {
  vi.useFakeTimers();
  replies = new UnheardReplies();
  gone = 0;
});
afterEach(() => vi.useRealTimers());

const watch = (): ReturnType<UnheardReplies['watch']> => replies.watch(() => gone++);

test('a client that hears none of its replies for long enough has gone, and that is told once', () => {
  const answer = watch();
  replies.unheard(answer.next()!);
  vi.advanceTimersByTime(GONE_AFTER_MS - 1);
  replies.unheard(answer.next()!);
  expect(gone).toBe(0);
  const late = answer.next()!;
  vi.advanceTimersByTime(1);
  replies.unheard(late);
  replies.unheard(late);
  expect([gone, answer.next(), replies.size]).toEqual([1, undefined, 0]);
});

test('a client that heard one in between has not', () => {
  const answer = watch();
  for (let second = 0; second < 60; second++) {
    const name = answer.next()!;
    if (second % 4 !== 0) replies.unheard(name);
    vi.advanceTimersByTime(1_000);
  }
  expect(gone).toBe(0);
});

test('one late reply proves nothing, nor do those of another answer or of none', () => {
  const [answer, other, ended] = [watch(), watch(), watch()];
  const name = ended.next()!;
  ended.end();
  vi.advanceTimersByTime(10 * GONE_AFTER_MS);
  replies.unheard(answer.next()!);
  vi.advanceTimersByTime(GONE_AFTER_MS);
  for (const each of [other.next()!, name, '', 'x', 'x.y']) replies.unheard(each);
  expect([gone, replies.size]).toEqual([0, 2]);
});
