-- Which parts of database.yml the database already has; the parameter is the source of the audit's function.
SELECT
    EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') AS timescaledb,
    (
        SELECT count(*) = 2 FROM pg_event_trigger JOIN pg_proc ON pg_proc.oid = evtfoid
        WHERE evtname IN ('larder_audit', 'larder_audit_drop') AND evtenabled = 'A' AND prosrc = %s
    ) AND EXISTS (
        SELECT FROM pg_db_role_setting JOIN pg_database ON pg_database.oid = setdatabase
        WHERE datname = current_database() AND setrole = 0 AND 'pgaudit.log=none' = ANY (setconfig)
    ) AS audited
