import { createComplaints, MAX_PER_WINDOW, Registry } from '@lamina/runtime';
import { expect, test } from 'vitest';
import { Access } from '../src/http/access.ts';
import { RateLimit } from '../src/http/rate-limit.ts';
import { createHttpServer } from '../src/http.ts';

test('HTTP requests that fail are all counted and answered, and few are logged, by their route', async () => {
  const registry = new Registry();
  const lines: { subject?: string }[] = [];
  const fail = (): never => {
    throw new Error('broken');
  };
  const server = createHttpServer({
    modelId: 'm',
    gateway: { open: fail, follow: fail, unfollow: fail, hangUp: fail, stateOf: fail, requestCancel: fail },
    access: new Access(undefined, { requests: new RateLimit(0, ''), followUps: new RateLimit(0, '') }),
    clusterState: fail,
    metrics: fail,
    bodyLimitBytes: 1_024,
    corsOrigin: undefined,
    maxConnections: 1,
    onError: createComplaints({ error: (fields) => lines.push(fields) }, registry),
  });
  for (let time = 0; time < 5 * MAX_PER_WINDOW; time++) {
    const answer = await server.inject({ url: `/v1/requests/secret-${time}` });
    expect([answer.statusCode, answer.json()]).toMatchObject([500, { error: { code: 'internal' } }]);
    expect(answer.body).not.toContain('broken');
  }
  await server.close();
  expect(await registry.metrics()).toContain(`code="internal"} ${5 * MAX_PER_WINDOW}`);
  const failures = lines.filter(({ subject }) => subject !== undefined);
  expect(new Set(failures.map(({ subject }) => subject))).toEqual(new Set(['GET /v1/requests/:id']));
  // A slow machine may need more than one window.
  expect(failures.length).toBeLessThan(5 * MAX_PER_WINDOW);
});
