/** Owns asking a gateway whether a prompt would be answered: /health over HTTP. What comes back is schema-checked. */
import { z } from 'zod';

const healthSchema = z.object({ status: z.literal('ok'), executors: z.int(), shards: z.int(), freeBlocks: z.int() });
const unhealthySchema = z.object({ reason: z.string() });

export type Health =
  | { readonly isReady: true; readonly executors: number; readonly shards: number }
  | { readonly isReady: false; readonly reason: string };

/** What /health says; a server that does not answer is not ready. */
export async function readHealth(httpUrl: string, timeoutMs: number): Promise<Health> {
  let body: unknown;
  try {
    const reply = await fetch(`${httpUrl}/health`, { signal: AbortSignal.timeout(timeoutMs) });
    body = await reply.json();
  } catch (cause) {
    return { isReady: false, reason: `${httpUrl}/health does not answer (${String(cause)})` };
  }
  const health = healthSchema.safeParse(body).data;
  if (health !== undefined) return { isReady: true, executors: health.executors, shards: health.shards };
  return { isReady: false, reason: unhealthySchema.safeParse(body).data?.reason ?? `${httpUrl} is no gateway` };
}
