// Parses every Mermaid diagram of the pages that are named. Beside node_modules with mermaid and jsdom.
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, ...pages] = process.argv.slice(2);
const require = createRequire(path.join(path.resolve(modules), 'here.js'));
const { JSDOM } = require('jsdom');
globalThis.window = new JSDOM('<!doctype html><body></body>').window;
globalThis.document = globalThis.window.document;
const entry = path.join(modules, 'node_modules/mermaid/dist/mermaid.core.mjs');
const { default: mermaid } = await import(pathToFileURL(path.resolve(entry)));

let wrong = 0;
for (const page of pages) {
  const text = fs.readFileSync(page, 'utf8');
  for (const [, diagram] of text.matchAll(/^ *```mermaid\n([\s\S]*?)^ *```$/gm)) {
    try {
      await mermaid.parse(diagram);
    } catch (error) {
      wrong += 1;
      console.log(`${page}: ${error.message}`);
    }
  }
}
process.exit(wrong ? 1 : 0);
