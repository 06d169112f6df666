/** The house has one direction: who may import whom, and which package is the only one to touch a library. */
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));

/** Workspace -> workspaces it may import. Everything that is not listed is forbidden. */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  'packages/tensor': [],
  'packages/protocol': ['tensor'],
  'packages/bus': ['tensor', 'protocol'],
  'packages/runtime': ['tensor', 'protocol', 'bus'],
  'packages/model': ['tensor'],
  'packages/attention-kernel': ['tensor'],
  'packages/cli': ['tensor', 'protocol', 'bus', 'runtime', 'model', 'testkit'],
  'packages/testkit': ['tensor', 'protocol', 'bus', 'runtime', 'model'],
  'services/gateway': ['tensor', 'protocol', 'bus', 'runtime', 'model'],
  'services/dense-executor': ['tensor', 'protocol', 'bus', 'runtime', 'model', 'attention-kernel'],
  'services/attention-shard': ['tensor', 'protocol', 'bus', 'runtime', 'attention-kernel'],
  'services/kv-manager': ['tensor', 'protocol', 'bus', 'runtime'],
};

/** Library -> the only workspaces that import it. */
const SOLE_IMPORTERS: Readonly<Record<string, readonly string[]>> = {
  nats: ['packages/bus'],
  msgpackr: ['packages/protocol'],
  'onnxruntime-node': ['services/dense-executor', 'packages/testkit'],
  'onnx-proto': ['packages/model'],
  '@huggingface/hub': ['packages/model'],
  xstate: ['services/dense-executor'],
  pino: ['packages/runtime'],
  'prom-client': ['packages/runtime'],
  fastify: ['services/gateway'],
};

interface SourceFile {
  readonly workspace: string;
  readonly path: string;
  readonly text: string;
  readonly imports: readonly string[];
}

function sourcesOf(workspace: string): SourceFile[] {
  const found: SourceFile[] = [];
  const visit = (directory: string): void => {
    for (const name of readdirSync(directory)) {
      const path = join(directory, name);
      if (statSync(path).isDirectory()) visit(path);
      else if (name.endsWith('.ts')) {
        const text = readFileSync(path, 'utf8');
        const imports = [...text.matchAll(/(?:from|import)\s*\(?\s*'([^']+)'/g)].map((match) => match[1]!);
        found.push({ workspace, path, text, imports });
      }
    }
  };
  visit(join(ROOT, workspace, 'src'));
  return found;
}

const workspaces = ['packages', 'services'].flatMap((kind) =>
  readdirSync(join(ROOT, kind)).map((name) => `${kind}/${name}`),
);
const sources = workspaces.flatMap(sourcesOf);

describe('structure', () => {
  it('knows every workspace', () => {
    expect(workspaces.sort()).toEqual(Object.keys(MAY_IMPORT).sort());
    expect(sources.length).toBeGreaterThan(workspaces.length);
  });

  it.each(Object.entries(MAY_IMPORT))('%s imports only %j', (workspace, allowed) => {
    for (const { path, imports } of sources.filter((source) => source.workspace === workspace)) {
      for (const specifier of imports) {
        const name = /^@lamina\/([^/]+)/.exec(specifier)?.[1];
        if (name !== undefined) expect(allowed, relative(ROOT, path)).toContain(name);
        if (specifier.startsWith('.')) {
          const target = resolve(dirname(path), specifier);
          expect(target.startsWith(join(ROOT, workspace, 'src')), `${relative(ROOT, path)} imports ${specifier}`).toBe(
            true,
          );
        }
      }
    }
  });

  it.each(Object.entries(SOLE_IMPORTERS))('%s is imported by %j only', (library, allowed) => {
    const importers = new Set(
      sources
        .filter((source) =>
          source.imports.some((specifier) => specifier === library || specifier.startsWith(`${library}/`)),
        )
        .map((source) => source.workspace),
    );
    expect(importers.size, 'nobody imports it: drop it from the table').toBeGreaterThan(0);
    for (const importer of importers) expect(allowed).toContain(importer);
  });

  it('reads process.env in one file', () => {
    const readers = sources
      .filter((source) => /^[^*]*process\.env/m.test(source.text.replace(/\/\*[\s\S]*?\*\//g, '')))
      .map((source) => relative(ROOT, source.path));
    expect(readers).toEqual(['packages/runtime/src/config.ts']);
  });

  it('has no import cycle between files', () => {
    const edges = new Map(
      sources.map((source) => [
        source.path,
        source.imports
          .filter((specifier) => specifier.startsWith('.'))
          .map((specifier) => resolve(dirname(source.path), specifier)),
      ]),
    );
    const state = new Map<string, 'open' | 'done'>();
    const visit = (path: string, trail: string[]): void => {
      if (state.get(path) === 'done') return;
      expect(
        state.get(path),
        `cycle: ${[...trail, path].map((each) => relative(ROOT, each)).join(' -> ')}`,
      ).toBeUndefined();
      state.set(path, 'open');
      for (const next of edges.get(path) ?? []) visit(next, [...trail, path]);
      state.set(path, 'done');
    };
    for (const path of edges.keys()) visit(path, []);
  });

  it('opens every file with what it owns', () => {
    for (const { path, text } of sources)
      expect(text.startsWith('/**') || text.startsWith('#!'), relative(ROOT, path)).toBe(true);
  });
});
