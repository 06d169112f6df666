import { expect, test } from 'vitest';
import { FewAtATime } from '../src/few-at-a-time.ts';

test('never more than so many run, each in its turn, and one that fails fails alone', async () => {
  const few = new FewAtATime(3);
  const begun: number[] = [];
  let numRunning = 0;
  let most = 0;
  const task = async (index: number): Promise<number> => {
    begun.push(index);
    most = Math.max(most, ++numRunning);
    await new Promise((resolve) => setTimeout(resolve, index % 4));
    numRunning--;
    if (index % 5 === 0) throw new Error(`${index}`);
    return index;
  };
  const indices = Array.from({ length: 50 }, (_, index) => index);
  const outcomes = await Promise.allSettled(indices.map((index) => few.run(() => task(index))));
  expect(begun).toEqual(indices);
  expect([most, numRunning]).toEqual([3, 0]);
  outcomes.forEach((outcome, index) => {
    expect(outcome.status).toBe(index % 5 === 0 ? 'rejected' : 'fulfilled');
  });
  expect(await few.run(async () => 'again')).toBe('again');
});
