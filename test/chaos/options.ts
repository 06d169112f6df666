/** Owns what `npm run chaos -- [--long] [--seed N] [--json FILE] [--only TEXT]` means; run.mjs hands it over as variables. */
import { processEnvironment } from '@lamina/runtime';

export interface ChaosOptions {
  readonly isLong: boolean;
  readonly seed: number;
  readonly jsonPath: string | undefined;
}

export function readOptions(): ChaosOptions {
  const { LAMINA_CHAOS_LONG, LAMINA_CHAOS_SEED, LAMINA_CHAOS_JSON } = processEnvironment();
  return {
    isLong: LAMINA_CHAOS_LONG === '1',
    seed: Number(LAMINA_CHAOS_SEED ?? '1'),
    jsonPath: LAMINA_CHAOS_JSON,
  };
}
