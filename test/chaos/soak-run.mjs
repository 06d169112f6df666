/** Owns the command line of the soak: `npm run soak -- [--minutes N] [--seed N] [--json FILE]`. */
import { parseArgs } from 'node:util';

const COLLECT = new URL('../memory/collect.mjs', import.meta.url);

/**
 * @param {readonly string[]} args
 * @returns {{ environment: Record<string, string>, vitestArgs: string[] }}
 */
export function readSoakArguments(args) {
  const { values } = parseArgs({
    args: [...args],
    options: {
      minutes: { type: 'string', default: '30' },
      seed: { type: 'string', default: '1' },
      json: { type: 'string' },
    },
  });
  if (!/^[1-9]\d{0,4}$/.test(values.minutes))
    throw new TypeError(`--minutes ${values.minutes}: must be a whole number from 1 to 99999`);
  if (!/^\d{1,9}$/.test(values.seed)) throw new TypeError(`--seed ${values.seed}: must be a number of up to 9 digits`);
  return {
    environment: {
      // Inherited by the processes of the cluster.
      NODE_OPTIONS: `--import ${COLLECT.href}`,
      LAMINA_SOAK_MINUTES: values.minutes,
      LAMINA_SOAK_SEED: values.seed,
      ...(values.json !== undefined && { LAMINA_SOAK_JSON: values.json }),
    },
    vitestArgs: ['--config', 'test/chaos/soak.vitest.config.ts'],
  };
}
