// Owns how `npm test` runs: every test but the compose test, which has its own configuration in test/e2e.
import { defineConfig } from 'vitest/config';

/** They hold promises in milliseconds: beside another test they would measure that one too. */
const ALONE = ['test/e2e/cancel.test.ts', 'test/e2e/overload.test.ts'];
const NOT_TESTS = ['test/e2e/compose.test.ts', '**/node_modules/**', '**/dist/**'];

export default defineConfig({
  test: {
    projects: [
      {
        extends: true,
        test: {
          name: 'beside-each-other',
          include: [
            'packages/*/{src,test}/**/*.test.ts',
            'services/*/{src,test}/**/*.test.ts',
            'test/{structure,contract,synthetic,memory,e2e}/**/*.test.ts',
            'test/chaos/verdict.test.ts',
          ],
          exclude: [...NOT_TESTS, ...ALONE],
          // Tests start real servers and clusters; more at a time would only make each other's timings longer.
          maxWorkers: 2,
          sequence: { groupOrder: 0 },
        },
      },
      { extends: true, test: { name: 'alone', include: ALONE, maxWorkers: 1, sequence: { groupOrder: 1 } } },
    ],
    pool: 'forks',
    testTimeout: 30_000,
    hookTimeout: 30_000,
    teardownTimeout: 10_000,
  },
});
