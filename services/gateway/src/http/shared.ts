/**
 * Owns sharing an answer that is dear to find among those who ask for it at about the same time.
 */

/** Calls `ask` when nobody has within `maxAgeMs`; a failure is told to those who wait for it, and not kept. */
export function shared<T>(ask: () => Promise<T>, maxAgeMs: number): () => Promise<T> {
  let answer: Promise<T> | undefined;
  let askedAtMs = 0;
  return () => {
    const nowMs = performance.now();
    if (answer !== undefined && nowMs - askedAtMs < maxAgeMs) return answer;
    const asked = ask();
    askedAtMs = nowMs;
    answer = asked;
    asked.catch(() => {
      if (answer === asked) answer = undefined;
    });
    return asked;
  };
}
