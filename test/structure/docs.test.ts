/** docs/ tells the truth: what is generated from the code is up to date, and links lead somewhere. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { renderConfiguration, renderErrors, renderStateChart, renderSubjects } from './render-docs.ts';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const doc = (name: string): string => join(ROOT, 'docs', name);

describe('docs', () => {
  it.each([
    ['subjects.md', renderSubjects],
    ['configuration.md', renderConfiguration],
    ['errors.md', renderErrors],
  ])('%s is what the code says', async (name, render) => {
    await expect(render()).toMatchFileSnapshot(doc(name));
  });

  it('architecture.md has the state chart of the request machine', async () => {
    const text = readFileSync(doc('architecture.md'), 'utf8');
    const parts = text.split(/(<!-- state chart -->\n```mermaid\n)[\s\S]*?(\n```\n<!-- end of state chart -->)/);
    expect(parts, 'the markers of the state chart are missing').toHaveLength(4);
    const [before, open, close, after] = parts;
    await expect(`${before}${open}${renderStateChart()}${close}${after}`).toMatchFileSnapshot(doc('architecture.md'));
  });

  it('links to files that exist', () => {
    const pages = [
      ...readdirSync(join(ROOT, 'docs')).map((name) => join(ROOT, 'docs', name)),
      join(ROOT, 'README.md'),
    ].filter((path) => path.endsWith('.md'));
    for (const page of pages) {
      for (const [, target] of readFileSync(page, 'utf8').matchAll(/\]\((?!https?:|#)([^)#]+)/g)) {
        expect(existsSync(join(dirname(page), target!)), `${relative(ROOT, page)} -> ${target}`).toBe(true);
      }
    }
  });
});
